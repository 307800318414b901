"""Pictures of what is kept: the patches, the groups that they belong to, and their scores. It does not travel."""

import colorsys
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from .context import SELECTIONS, Selection
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


@torch.no_grad()
def explain(model: Any, processor: Any, image: Image.Image) -> Explanation:
    """
    What a model keeps of an image, by its present settings. Of an image with several views (crops or tiles) the first.

    Args:
        model: of a PruneSID class.
        processor: the model's, or the stock one.
        image (`PIL.Image.Image`): any size.

    Raises:
        `ValueError`: if nothing is dropped, or the tokens of the view form no grid.
    """
    images = processor.image_processor(images=image, return_tensors="pt").to(model.device, model.dtype)
    wanted = inspect.signature(model.get_image_features).parameters
    found: list[Any] = []
    listening = SELECTIONS.set(found)
    try:
        model.get_image_features(**{name: value for name, value in images.items() if name in wanted})
    finally:
        SELECTIONS.reset(listening)
    if not found:
        raise ValueError(
            f"Nothing is dropped of this image, so there is nothing to explain: "
            f"prunesid_config.budget={model.config.prunesid_config.budget}. Set a smaller budget."
        )
    selection, views, context = found[0]
    length = views.shape[1] if context.lengths is None else context.lengths[0]

    def own(values):
        return None if values is None else values[:1, :length]

    def row(values):
        return None if values is None else values[0, :length].float().cpu()

    first = Selection(selection.indices[:1], selection.counts[:1], None, own(selection.groups), own(selection.scores))
    found_suppressors = find_suppressors(
        views[:1, :length], first, model.config.prunesid_config, context.of_views(0, 1, length)
    )
    tau, suppressors = found_suppressors or (None, None)

    groups = row(selection.groups)
    return Explanation(
        kept=selection.indices[0, : int(selection.counts[0])].cpu(),
        groups=None if groups is None else groups.long(),
        scores=row(selection.scores),
        rho=None if selection.rho is None else float(selection.rho[0]),
        grid=_grid_of(images, length, model),
        is_cropped=len(views) == 1 and bool(getattr(processor.image_processor, "do_center_crop", False)),
        compared=row(views),
        tau=tau,
        suppressors=None if suppressors is None else suppressors.cpu(),
    )


def visualize(image: Image.Image, output: Explanation) -> Image.Image:
    """
    The image, the patches that are kept of it with outlines in the colour of their group, and the scores.

    Args:
        image (`PIL.Image.Image`): that of `output`.
        output ([`Explanation`]): of [`explain`].

    Example:
        ```python
        output = explain(model, processor, image)
        visualize(image, output).save("kept.png")
        ```
    """
    rows, columns = output.grid
    image = image.convert("RGB")
    if output.is_cropped:
        side = min(image.size)
        image = ImageOps.fit(image, (side, round(side * rows / columns)))
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


def _grid_of(images: Any, length: int, model: Any) -> tuple[int, int]:
    if "image_grid_thw" in images:
        _, rows, columns = images["image_grid_thw"][0].tolist()
        merge = model.config.vision_config.spatial_merge_size
        return rows // merge, columns // merge
    side = round(length**0.5)
    if side**2 != length:
        raise ValueError(f"The {length} tokens of a view form no square grid, which visualize draws.")
    return side, side
