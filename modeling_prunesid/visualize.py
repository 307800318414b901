"""Pictures of what is kept: the patches, the groups that they belong to, and their scores. It does not travel."""

import colorsys
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from .context import SELECTIONS, Selection
from .family import stock_class
from .suppression import find_suppressors


CELL = 16  # pixels of a patch, at least
DIM = 0.3  # brightness of a patch that is dropped
GAP, TITLE = 8, 22  # pixels between panels, and above them


@dataclass
class Explanation:
    """
    Which tokens of a view are kept, and why.

    Attributes:
        kept (`torch.LongTensor` of shape `(N,)`): ascending indices of the kept tokens, in rows of the grid.
        groups (`torch.LongTensor` of shape `(T,)`, *optional*): the group of each token, -1 for none.
        scores (`torch.FloatTensor` of shape `(T,)`, *optional*): what tokens are ranked by; larger is more important.
        rho (`float`, *optional*): the redundancy of the view (equation 4).
        grid (`tuple[int, int]`): rows and columns of tokens.
        is_cropped (`bool`): the processor crops the centre of the image, in place of squeezing it.
        compared (`torch.FloatTensor` of shape `(T, dim)`, *optional*): the features that tokens are compared by.
        tau (`float`, *optional*): from this similarity on, a better token of its group suppresses another one.
        suppressors (`torch.LongTensor` of shape `(T,)`, *optional*): what suppressed each token, -1 for nothing.
        picture (`PIL.Image.Image`, *optional*): the view, where it is one of several; else it is the image.
    """

    kept: torch.LongTensor
    groups: torch.LongTensor | None
    scores: torch.FloatTensor | None
    rho: float | None
    grid: tuple[int, int]
    is_cropped: bool = False
    compared: torch.FloatTensor | None = None
    tau: float | None = None
    suppressors: torch.LongTensor | None = None
    picture: Image.Image | None = None


def explain(model: Any, processor: Any, image: Image.Image) -> Explanation:
    """
    What a model keeps of an image, by its present settings. Of an image with several views (crops or tiles), only the
    first is explained.

    Args:
        model: of a PruneSID class.
        processor: the model's, or the stock one.
        image (`PIL.Image.Image`): any size.

    Returns:
        [`Explanation`]: the kept tokens, their groups (section 3.2) and scores, for [`visualize`].

    Raises:
        `ValueError`: if nothing is dropped, or the tokens of the view form no grid.
    """
    return explain_views(model, processor, image)[0]


@torch.no_grad()
def explain_views(model: Any, processor: Any, image: Image.Image | Sequence[Image.Image]) -> list[Explanation]:
    """
    As [`explain`], of every view: the crops or tiles of an image, or the frames of a clip (of families that read
    several as one, such as Qwen-VL, of each such group).

    Args:
        image (`PIL.Image.Image` or a sequence of them): an image, or the frames of a clip.
    """
    is_clip = not isinstance(image, Image.Image)
    frames: Any = image if is_clip else [image]
    if is_clip:
        clip = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
        inputs = processor.video_processor(videos=[clip], do_sample_frames=False, return_tensors="pt")
    else:
        inputs = processor.image_processor(images=image, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    base = model.model if hasattr(getattr(model, "model", None), "get_image_features") else model
    has_clips = is_clip and hasattr(stock_class(type(base)), "get_video_features")
    encode, given = base.get_video_features if has_clips else base.get_image_features, dict(inputs)
    if is_clip and not has_clips:  # frames are images to this family
        given = {"pixel_values": inputs["pixel_values_videos"].flatten(0, -4)}
    wanted = inspect.signature(encode).parameters
    given = {name if name in wanted else name.removesuffix("_images"): value for name, value in given.items()}
    found: list[Any] = []
    listening = SELECTIONS.set(found)
    try:
        encode(**{name: value for name, value in given.items() if name in wanted})
    finally:
        SELECTIONS.reset(listening)
    if not found:
        raise ValueError(
            f"Nothing is dropped of this {'clip' if is_clip else 'image'}, so there is nothing to explain: "
            f"prunesid_config.budget={model.config.prunesid_config.budget}. Set a smaller budget."
        )
    explained = [one for call in found for one in _explain_call(call, model.config.prunesid_config)]
    ratio = None if is_clip or len(explained) > 1 else frames[0].width / frames[0].height
    pictures = _pictures_of(inputs, processor.video_processor if is_clip else processor.image_processor)
    for place, one in enumerate(explained):
        one.grid = _grid_of(inputs, one.grid[1], model, ratio)
        if len(explained) > 1 and len(pictures) == len(explained):
            one.picture = pictures[place]
        elif is_clip:
            one.picture = frames[place * len(frames) // len(explained)]
    explained[0].is_cropped = len(explained) == 1 and bool(getattr(processor.image_processor, "do_center_crop", False))
    return explained


def _explain_call(call: tuple, settings: Any) -> list[Explanation]:
    """Of each view of a selection; its grid is one row of tokens so far."""
    selection, views, context, chosen, counts, lengths = call
    explained = [
        Explanation(torch.arange(count), None, None, None, (1, length)) for count, length in zip(counts, lengths)
    ]
    for place, view in enumerate(chosen):
        length, one = lengths[view], explained[view]

        def own(values, place=place, length=length):
            return None if values is None else values[place : place + 1, :length]

        def row(values, own=own):
            return None if values is None else own(values)[0].float().cpu()

        first = Selection(
            selection.indices[place : place + 1],
            selection.counts[place : place + 1],
            None,
            own(selection.groups),
            own(selection.scores),
        )
        groups = row(selection.groups)
        one.kept = selection.indices[place, : int(selection.counts[place])].cpu()
        one.groups = None if groups is None else groups.long()
        one.scores, one.compared = row(selection.scores), row(views)
        one.rho = None if selection.rho is None else float(selection.rho[place])
        found = find_suppressors(own(views), first, settings, context.of_views(place, place + 1, length))
        if found is not None:
            one.tau, one.suppressors = found[0], found[1].cpu()
    return explained


def visualize(image: Image.Image, output: Explanation) -> Image.Image:
    """
    Draws what is kept of an image: the image, its kept patches outlined in the colour of their group, and the scores.

    Args:
        image (`PIL.Image.Image`): the image that was explained.
        output ([`Explanation`]): what [`explain`] returned for it.

    Returns:
        `PIL.Image.Image`: the panels side by side.

    Example:
        ```python
        output = explain(model, processor, image)
        visualize(image, output).save("kept.png")
        ```
    """
    rows, columns = output.grid
    image = shown_part(image, output)
    cell = max(CELL, round(max(image.size) / max(rows, columns)))
    image = image.resize((columns * cell, rows * cell))
    outlined = [] if output.groups is None else sorted(set(output.groups[output.kept].tolist()))
    named = f", {len(outlined)} groups" if len(outlined) > 1 else ""
    panels = [
        (f"{rows} x {columns} = {rows * columns} tokens", image),
        (f"{len(output.kept)} kept{named}", draw_kept(image, output.kept, output.groups, output.grid)),
    ]
    if output.scores is not None:
        panels.append(("scores, dark to bright", _draw_scores(image, output.scores, output.grid)))
    return beside(panels)


def shown_part(image: Image.Image, output: Explanation) -> Image.Image:
    """The part of an image that an explanation is of: its view, or all of it that the processor does not crop."""
    if output.picture is not None:
        return output.picture.convert("RGB")
    image, (rows, columns) = image.convert("RGB"), output.grid
    if output.is_cropped:
        side = min(image.size)
        image = ImageOps.fit(image, (side, max(round(side * rows / columns), 1)))
    return image


def draw_kept(
    image: Image.Image, kept: torch.LongTensor, groups: torch.LongTensor | None, grid: tuple[int, int]
) -> Image.Image:
    """
    The image with the dropped patches dimmed, and neighbouring kept patches of one group outlined in its colour.

    Args:
        image (`PIL.Image.Image`): it is resized to a whole number of pixels for each patch.
        kept (`torch.LongTensor` of shape `(N,)`), groups (`torch.LongTensor` of shape `(T,)`, *optional*), grid: as in
            [`Explanation`].
    """
    rows, columns = grid
    cell = max(CELL, round(image.width / columns))
    image = image.resize((columns * cell, rows * cell))
    is_kept = torch.zeros(rows * columns, dtype=torch.bool)
    is_kept[kept] = True
    bright = np.kron(is_kept.view(rows, columns).numpy(), np.ones((cell, cell), dtype=bool))[..., None]
    pixels = np.asarray(image, dtype=np.float32)
    grey = DIM * pixels.mean(axis=2, keepdims=True) + 20
    picture = Image.fromarray(np.where(bright, pixels, grey).round().astype(np.uint8))
    if groups is not None:
        pen = ImageDraw.Draw(picture)
        for start, end, colour in group_outlines(kept, groups, grid):
            points = [(round(x * cell), round(y * cell)) for x, y in (start, end)]
            pen.line(points, fill=colour, width=max(cell // 8, 2))
    return picture


def group_outlines(
    kept: torch.LongTensor, groups: torch.LongTensor, grid: tuple[int, int]
) -> list[tuple[tuple[float, float], tuple[float, float], tuple[int, int, int]]]:
    """Lines around each run of kept neighbours of one group: two points `(x, y)` in patches, and a colour."""
    rows, columns = grid
    shown = torch.full((rows * columns,), -2)
    shown[kept] = groups[kept]
    table = torch.nn.functional.pad(shown.view(rows, columns), (1, 1, 1, 1), value=-2)
    hues = {group: rank * 0.618034 % 1 for rank, group in enumerate(sorted(set(groups[kept].tolist())))}
    lines = []
    for index in kept.tolist():
        row, column = divmod(index, columns)
        group = int(groups[index])
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hues[group], 0.75, 1.0))
        # Drawn a little inside the patch, so that neighbours of two groups show both colours.
        top, left, bottom, right = row + 0.06, column + 0.06, row + 0.94, column + 0.94
        sides = {
            (-1, 0): ((left, top), (right, top)),
            (1, 0): ((left, bottom), (right, bottom)),
            (0, -1): ((left, top), (left, bottom)),
            (0, 1): ((right, top), (right, bottom)),
        }
        for (down, across), (start, end) in sides.items():
            if table[row + 1 + down, column + 1 + across] != group:
                lines.append((start, end, (red, green, blue)))
    return lines


def beside(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Titled pictures of one height, beside each other."""
    width = sum(panel.width for _, panel in panels) + GAP * (len(panels) - 1)
    sheet = Image.new("RGB", (width, TITLE + max(panel.height for _, panel in panels)), "white")
    pen, left = ImageDraw.Draw(sheet), 0
    for title, panel in panels:
        pen.text((left + panel.width / 2, TITLE / 2), title, fill="black", anchor="mm", font_size=14)
        sheet.paste(panel, (left, TITLE))
        left += panel.width + GAP
    return sheet


def _draw_scores(image: Image.Image, scores: torch.FloatTensor, grid: tuple[int, int]) -> Image.Image:
    """The ranks of the scores as brightness: scores themselves differ by orders of magnitude."""
    ranks = scores.argsort(stable=True).argsort(stable=True).float() / max(len(scores) - 1, 1)
    cells = Image.fromarray((ranks.view(grid) * 255).round().byte().numpy())
    return ImageOps.colorize(cells, "#0d1b3e", "#fff3b0", mid="#d1495b").resize(image.size, Image.Resampling.NEAREST)


def _grid_of(inputs: Any, length: int, model: Any, ratio: float | None) -> tuple[int, int]:
    """Rows and columns of a view; `ratio` is the width of the image over its height, if the view is all of it."""
    for name in ("image_grid_thw", "video_grid_thw"):
        if name in inputs:
            _, rows, columns = inputs[name][0].tolist()
            merge = max(math.isqrt(rows * columns // length), 1)  # what towers call it differs
            if rows // merge * (columns // merge) != length:  # tokens that end rows besides
                merge = getattr(model.config.vision_config, "spatial_merge_size", merge)
            return rows // merge, columns // merge
    side = round(length**0.5)
    if side**2 == length:
        return side, side
    if ratio is not None:  # the tokens of an image of any size, whose grid has about its shape
        grids = [(rows, length // rows) for rows in range(1, length + 1) if length % rows == 0]
        rows, columns = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0] / ratio)))
        if abs(rows - (length / ratio) ** 0.5) < 1 and abs(columns - (length * ratio) ** 0.5) < 1:
            return rows, columns
    raise ValueError(f"The {length} tokens of a view form no grid that could be drawn.")


def _pictures_of(inputs: Any, processor: Any) -> list[Image.Image]:
    """What the tower sees, of inputs that are pixels and not patches: the crops, tiles or frames."""
    names = ("pixel_values", "pixel_values_images", "pixel_values_videos")
    pixels = next((inputs[name] for name in names if isinstance(inputs.get(name), torch.Tensor)), None)
    if pixels is None or pixels.dim() < 4 or pixels.shape[-3] != 3:
        return []
    pixels = pixels.reshape(-1, *pixels.shape[-3:]).float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, deviation = (torch.tensor(getattr(processor, name)) for name in ("image_mean", "image_std"))
        pixels = pixels * deviation[:, None, None] + mean[:, None, None]
    pixels = (pixels * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(view.numpy()) for view in pixels]
