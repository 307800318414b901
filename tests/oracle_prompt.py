"""
An independent reading of the contract of `forward` and `generate`, for every family of the package.

Each row of a batch is run alone in the stock class, on a prompt shortened by hand: of the stock features of a view,
and of its placeholders, those remain that `keep_indices` names. What comes out is laid along the caller's columns by
loops. (ViTCoP and `llm_budget` drop tokens where no stock class does: there a row alone, short, in our own class
stands in.) Everything runs in float64, because two orders of summation are compared.
"""

import contextlib
import dataclasses
import inspect
import random
from typing import Any

import torch
import transformers
from copies import remembered
from tiny import BOS, EOS, IMAGE, PAD, TEXT, VISION, stock_twin
from tiny_qwen import PATCH_DIM
from tiny_qwen import build as build_qwen
from tiny_qwen import prompt as qwen_prompt
from tiny_qwen import stock_twin as stock_qwen
from tiny_vitcop import build_vitcop
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import modeling_prunesid
from modeling_prunesid.tower_crops import pack_patches


CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
VIDEO = 101  # of Video-LLaVA; `tiny_qwen` has its own
IGNORED = -100
QWEN_IMAGE, QWEN_VIDEO, VISION_START, VISION_END = 93, 94, 91, 92


@contextlib.contextmanager
def in_float64():
    """Transformers and PruneSID upcast to float32 for precision (norms, rotary angles, losses); here to float64."""
    to, as_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def wide_to(self, *args, **kwargs):
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return to(self, *args, **kwargs)

    def wide_softmax(*args, **kwargs):
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return softmax(*args, **kwargs)

    torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = wide_to, torch.Tensor.double, wide_softmax
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = to, as_float, softmax


@dataclasses.dataclass(frozen=True)
class View:
    """An image or a clip: what stands for it in a full prompt, and a seed for its pixels."""

    modality: str
    size: tuple
    seed: int
    ids: tuple

    def places(self, family) -> list[int | None]:
        """For each of `ids`, the number of the placeholder, None for the marks between."""
        numbers, count = [], 0
        for token in self.ids:
            numbers.append(count if token in family.placeholders else None)
            count += token in family.placeholders
        return numbers


class Family:
    """A tiny model of ours, its stock twin, and how their views are made."""

    name = "LLaVA"
    placeholders = (IMAGE,)
    has_stock = True
    max_views = 3
    is_qwen = False
    vision = {}
    budget: Any = 8

    def build(self, budget=None):
        return _finish(self.make(self.budget if budget is None else budget))

    def make(self, budget):
        config = modeling_prunesid.PruneSIDLlavaConfig(**self.parts(), prunesid_config={"budget": budget})
        return _random(modeling_prunesid.PruneSIDLlavaForConditionalGeneration, config)

    def parts(self):
        return {
            "vision_config": {**VISION, **self.vision},
            "text_config": {**TEXT, "max_position_embeddings": 4096},
            "image_token_index": IMAGE,
        }

    stock_class = LlavaForConditionalGeneration

    def stock(self, ours):
        return _finish(stock_twin(ours, self.stock_class))

    @property
    def side(self):
        return {**VISION, **self.vision}["image_size"]

    @property
    def num_patches(self):
        return (self.side // VISION["patch_size"]) ** 2

    def view(self, rng: random.Random) -> View:
        return View("image", (self.side, self.side), rng.randrange(1000), (IMAGE,) * self.num_patches)

    def pixels(self, views: list[View]) -> dict:
        if not views:
            return {}
        return {"pixel_values": torch.stack([_noise(view.seed, 3, self.side, self.side) for view in views])}

    def types(self, input_ids) -> dict:
        return {}

    # What is kept of a view, and its features in the stock class

    def encode(self, model, view, **kwargs):
        with torch.no_grad():
            encode = getattr(model.model, f"get_{view.modality}_features")
            return encode(**self.pixels([view]), return_dict=True, **kwargs)

    def kept(self, ours, view) -> list[int]:
        output = self.encode(ours, view)
        if output.get("keep_indices") is None:
            return list(range(sum(place is not None for place in view.places(self))))
        return output.keep_indices[0].tolist()

    def features(self, stock, view) -> torch.Tensor:
        features = self.encode(stock, view).pooler_output
        features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
        return features.reshape(-1, features.shape[-1])

    def run_alone(self, ours, stock, row: "Row", positions: list[int] | None, prefix=None, **kwargs):
        """The stock class on one short row, its features written into the embeddings, behind a cache `prefix`."""
        mask, kwargs = behind(prefix, row, kwargs)
        if not self.has_stock:
            views = [view for view, _ in row.views]
            return ours(
                input_ids=torch.tensor([row.short_ids]),
                attention_mask=mask,
                position_ids=None if positions is None else torch.tensor([positions]),
                **self.pixels(views),
                num_visual_tokens=[self.budget] * len(views) or None,  # which dispels doubts of a run at an end
                **kwargs,
            )
        embeds = stock.get_input_embeddings()(torch.tensor([row.short_ids])).clone()
        for view, columns in row.views:
            features, kept = self.features(stock, view), row.kept[view]
            for column, place in columns:
                if place in kept:
                    embeds[0, row.short_column[column]] = features[place]
        return stock(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=None if positions is None else torch.tensor([positions]),
            **kwargs,
        )


class LlavaNext(Family):
    name, budget, max_views = "LLaVA-NeXT", 6, 2
    stock_class = transformers.LlavaNextForConditionalGeneration
    grids = [[28, 56], [56, 28], [56, 56]]
    sizes = [(40, 50), (30, 90), (60, 30), (28, 28), (56, 56)]

    def make(self, budget):
        config = modeling_prunesid.PruneSIDLlavaNextConfig(
            **self.parts(), image_grid_pinpoints=self.grids, prunesid_config={"budget": budget}
        )
        return _random(modeling_prunesid.PruneSIDLlavaNextForConditionalGeneration, config)

    def packed(self, size):
        return pack_patches(size, self.grids, 28, 4)

    def view(self, rng):
        return self.view_of(rng.choice(self.sizes), rng.randrange(1000))

    def view_of(self, size, seed):
        return View("image", size, seed, (IMAGE,) * len(self.packed(size)))

    def pixels(self, views):
        if not views:
            return {}
        crops = [image_size_to_num_patches(list(view.size), self.grids, 28) for view in views]
        pixel_values = torch.zeros(len(views), max(crops), 3, 28, 28, dtype=torch.float64)
        for image, (view, count) in enumerate(zip(views, crops)):
            pixel_values[image, :count] = _noise(view.seed, count, 3, 28, 28)
        return {"pixel_values": pixel_values, "image_sizes": torch.tensor([view.size for view in views])}


class VideoLlava(Family):
    name, budget, max_views, frames = "Video-LLaVA", 6, 2, 3
    placeholders = (IMAGE, VIDEO)
    stock_class = transformers.VideoLlavaForConditionalGeneration

    def make(self, budget):
        config = modeling_prunesid.PruneSIDVideoLlavaConfig(
            **self.parts(), video_token_index=VIDEO, prunesid_config={"budget": budget}
        )
        return _random(modeling_prunesid.PruneSIDVideoLlavaForConditionalGeneration, config)

    def view(self, rng):
        if rng.random() < 0.5:
            return super().view(rng)
        return View("video", (self.side,), rng.randrange(1000), (VIDEO,) * (self.frames * (self.num_patches + 1)))

    def pixels(self, views):
        clips = [_noise(v.seed, self.frames, 3, self.side, self.side) for v in views if v.modality == "video"]
        images = super().pixels([view for view in views if view.modality == "image"])
        name = list(inspect.signature(transformers.VideoLlavaModel.get_image_features).parameters)[1]
        if images:  # `pixel_values_images` in Transformers 5.18
            images = {name: images["pixel_values"]}
        return {**images, **({"pixel_values_videos": torch.stack(clips)} if clips else {})}


class MiniGemini(Family):
    name = "Mini-Gemini"
    stock_class = modeling_prunesid.MiniGeminiForConditionalGeneration

    def make(self, budget):
        high = {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 2, 1],
            "image_size": 2 * self.side,
            "layer_scale_init_value": 0.5,
            "initializer_range": 0.3,
        }
        config = modeling_prunesid.PruneSIDMiniGeminiConfig(
            **self.parts(), high_res_vision_config=high, prunesid_config={"budget": budget}
        )
        return _random(modeling_prunesid.PruneSIDMiniGeminiForConditionalGeneration, config)

    def pixels(self, views):
        if not views:
            return {}
        high = [_noise(view.seed + 1000, 3, 2 * self.side, 2 * self.side) for view in views]
        return {**super().pixels(views), "high_res_pixel_values": torch.stack(high)}


class LlmBudget(Family):
    name, has_stock, budget = "LLaVA with llm_budget", False, 16

    def make(self, budget):
        parts = self.parts()
        parts["text_config"] = {**parts["text_config"], "num_hidden_layers": 4}
        settings = {"budget": budget, "llm_budget": 8}
        config = modeling_prunesid.LayerPrunedLlavaConfig(**parts, prunesid_config=settings)
        return _random(modeling_prunesid.LayerPrunedLlavaForConditionalGeneration, config)


class ViTCoP(Family):
    name, has_stock = "ViTCoP", False

    def make(self, budget):
        return build_vitcop(budget, vision=self.vision)


class Qwen(Family):
    is_qwen, budget, max_views = True, 0.25, 2
    placeholders = (QWEN_IMAGE, QWEN_VIDEO)
    image_grids = [(1, 8, 12), (1, 6, 16), (1, 12, 6), (1, 4, 4), (1, 4, 12)]
    video_grids = [(2, 4, 8), (3, 6, 4)]

    def __init__(self, name):
        self.name = name

    def make(self, budget):
        return build_qwen(self.name, budget=budget)

    def stock(self, ours):
        return _finish(stock_qwen(ours, self.name))

    def view(self, rng):
        modality = "image" if rng.random() < 0.7 else "video"
        return self.view_of(modality, rng.choice(getattr(self, f"{modality}_grids")), rng.randrange(1000))

    def view_of(self, modality, grid, seed=0):
        return View(modality, grid, seed, tuple(qwen_prompt(self.name, (modality, grid))[0]))

    def pixels(self, views):
        inputs = {}
        for modality, suffix in (("image", ""), ("video", "_videos")):
            of_kind = [view for view in views if view.modality == modality]
            if of_kind:
                inputs[f"pixel_values{suffix}"] = torch.cat(
                    [_noise(v.seed, v.size[0] * v.size[1] * v.size[2], PATCH_DIM) for v in of_kind]
                )
                inputs[f"{modality}_grid_thw"] = torch.tensor([view.size for view in of_kind])
        if self.name == "Qwen2_5_VL" and "video_grid_thw" in inputs:
            # A clip longer than it is wide ends behind the text that follows it: upstream then decodes at other
            # positions than it gives the same tokens in a prompt, so that no answer with a cache is that without one.
            inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), 0.5)
        return inputs

    def types(self, input_ids):
        return {"mm_token_type_ids": (input_ids == QWEN_IMAGE).int() + 2 * (input_ids == QWEN_VIDEO).int()}

    def encode(self, model, view, **kwargs):
        inputs = {name: value for name, value in self.pixels([view]).items() if name != "second_per_grid_ts"}
        with torch.no_grad():
            return getattr(model.model, f"get_{view.modality}_features")(**inputs, return_dict=True, **kwargs)

    def full_positions(self, stock, row) -> torch.Tensor:
        """`(3, 1, length)`: upstream's positions of the full row, which are others where no row has a view."""
        ids, mask = row.ids, row.mask
        views = [view for view, columns in row.views if any(mask[column] for column, _ in columns)]
        if not row.is_with_views:
            return torch.arange(len(ids)).expand(3, 1, -1)
        if not views:
            seen = torch.tensor([mask])
            return (seen.cumsum(1) - 1).masked_fill(seen == 0, 0).expand(3, -1, -1)
        inputs = {name: value for name, value in self.pixels(views).items() if not name.startswith("pixel")}
        if self.name != "Qwen2_5_VL":
            inputs.pop("second_per_grid_ts", None)
        ids = torch.tensor([ids])
        return stock.model.get_rope_index(ids, attention_mask=torch.tensor([mask]), **self.types(ids), **inputs)[0]

    def run_alone(self, ours, stock, row, positions, prefix=None, **kwargs):
        mask, kwargs = behind(prefix, row, kwargs)
        first = mask.shape[1] - len(row.short_mask)
        views = [view for view, _ in row.views]
        places = self.full_positions(stock, row)[:, :, row.short_source] + first
        text = (torch.tensor([row.short_mask]).cumsum(1) - 1).clamp(min=0) + first
        encoded: dict[str, Any] = {}
        for view in views:
            output, kept = self.encode(stock, view), row.kept[view]
            features = torch.cat(list(output.pooler_output))[kept]
            layers = [torch.cat(list(layer))[kept] for layer in output.get("deepstack_features") or []]
            if view.modality not in encoded:
                encoded[view.modality] = output
                output.pooler_output = [features]
                if layers:
                    output.deepstack_features = [[layer] for layer in layers]
            else:
                whole = encoded[view.modality]
                whole.pooler_output.append(features)
                for layer, more in zip(whole.get("deepstack_features") or [], layers):
                    layer.append(more)
        ids = torch.tensor([row.short_ids])
        return stock(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.cat([text[None], places]),
            mm_encoder_outputs=encoded or None,
            **self.types(ids),
            **kwargs,
        )


FAMILIES = {
    family.name: family
    for family in (
        Family(),
        LlavaNext(),
        VideoLlava(),
        MiniGemini(),
        ViTCoP(),
        LlmBudget(),
        Qwen("Qwen2VL"),
        Qwen("Qwen2_5_VL"),
        Qwen("Qwen3VL"),
    )
}


@remembered
def _random(model_class, config):
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
        model.lm_head.weight[[PAD, EOS, IMAGE, VIDEO]] = 0  # never the best of 120 random logits
    return model


def _finish(model):
    return model.double().eval()


def _noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Rows


@dataclasses.dataclass
class Row:
    """One row of a batch in the caller's columns, and what it is when shortened by hand."""

    ids: list[int]
    mask: list[int]
    views: list[tuple[View, list[tuple[int, int]]]]  # with the (column, number) of each placeholder
    kept: dict[View, list[int]]
    is_with_views: bool = True  # whether any row of the batch has a view

    def __post_init__(self):
        dropped = set()
        for view, columns in self.views:
            dropped |= {column for column, place in columns if place not in self.kept[view]}
        self.is_dropped = [column in dropped for column in range(len(self.ids))]
        self.is_placeholder = [False] * len(self.ids)
        for _, columns in self.views:
            for column, _ in columns:
                self.is_placeholder[column] = True
        self.is_filled = [bool(value) or placeholder for value, placeholder in zip(self.mask, self.is_placeholder)]
        self.short_source = [column for column in range(len(self.ids)) if column not in dropped]
        self.short_column = {column: short for short, column in enumerate(self.short_source)}
        self.short_ids = [self.ids[column] for column in self.short_source]
        self.short_mask = [self.mask[column] for column in self.short_source]

    def is_padding(self, column: int, first: int = 0, last: int | None = None) -> bool:
        """
        Masked, before the first or behind the last that is not, of the columns from `first` to `last` that one forward
        is given; a placeholder is never padding.
        """
        filled = self.is_filled
        return not filled[column] and not (any(filled[first:column]) and any(filled[column:last]))

    def is_defined(self, column: int, first: int = 0, last: int | None = None) -> bool:
        """Whether the stock class gives `column` a value that depends on what the row holds."""
        return not self.is_padding(column, first, last) and any(self.mask[: column + 1])

    def carrier(self, column: int, first: int = 0, last: int | None = None) -> int | None:
        """
        The column whose value `column` carries in the output of a forward on the columns from `first` to `last`: its
        own, or that of the last kept column before it, or of the first kept one. None where padding might count as
        kept.
        """
        if not self.is_dropped[column]:
            return column
        for before in range(column - 1, first - 1, -1):
            if not self.is_dropped[before]:
                return None if self.is_padding(before, first, last) else before
        return next((after for after in range(column, len(self.ids)) if not self.is_dropped[after]), None)


def behind(prefix, row: Row, kwargs: dict) -> tuple[torch.Tensor, dict]:
    """The mask of a short row behind a cache that holds no token of it, and the arguments with that cache."""
    before = 0 if prefix is None else prefix.get_seq_length()
    mask = torch.tensor([[1] * before + row.short_mask])
    return mask, kwargs if prefix is None else {**kwargs, CACHE: prefix}


def make_rows(family: Family, ours, rows: list[list]) -> list[Row]:
    """The rows of a batch; see `make_row`."""
    made = [make_row(family, ours, parts) for parts in rows]
    for row in made:
        row.is_with_views = any(other.views for other in made)
    return made


def make_row(family: Family, ours, parts: list) -> Row:
    """A row of words, views, and words that the mask hides: `("hidden", word)` or `("hidden", view)`."""
    ids, mask, views, kept = [], [], [], {}
    for part in parts:
        hidden = isinstance(part, tuple)
        part = part[1] if hidden else part
        if isinstance(part, View):
            columns = [(len(ids) + at, place) for at, place in enumerate(part.places(family)) if place is not None]
            views.append((part, columns))
            kept[part] = family.kept(ours, part)
            ids += part.ids
            mask += [int(not hidden)] * len(part.ids)
        else:
            ids.append(part)
            mask.append(int(not hidden))
    return Row(ids, mask, views, kept)


def short_positions(rule: str | None, mask: list[int]) -> list[int] | None:
    """Positions of a row, written by a caller's rule."""
    if rule is None:
        return None
    if rule == "arange":
        return list(range(len(mask)))
    positions, seen = [], 0
    for value in mask:
        seen += value
        positions.append(seen - 1 if value else {"cumsum": seen - 1, "ones": 1, "zeros": 0}[rule])
    return [max(position, 0) for position in positions] if rule != "cumsum" else positions


@torch.no_grad()
def alone(family: Family, ours, stock, row: Row, rule: str | None = None, **kwargs):
    """The stock output of one row in its short columns."""
    kwargs = {"use_cache": False, **kwargs}
    return family.run_alone(ours, stock, row, short_positions(rule, row.short_mask), **kwargs)


def expand(short: torch.Tensor, row: Row, first: int = 0, last: int | None = None) -> list[torch.Tensor | None]:
    """
    The values `(short_length, dim)` along the caller's columns from `first` to `last`; None where anything finite is
    right.
    """
    last = len(row.ids) if last is None else last
    values: list[torch.Tensor | None] = []
    for column in range(first, last):
        carrier = row.carrier(column, first, last)
        known = carrier is not None and row.is_defined(carrier, first, last)
        values.append(short[row.short_column[carrier]] if known else None)
    return values


def check_columns(what: str, got: torch.Tensor, rows: list[list], problems: list[str], tolerance=1e-8) -> None:
    """Compare `(batch, columns, dim)` with what `expand` gave for each row."""
    if got.shape[:2] != (len(rows), len(rows[0])):
        problems.append(f"{what}: shape {tuple(got.shape)}, expected {(len(rows), len(rows[0]))} rows and columns")
        return
    if not torch.isfinite(got).all():
        problems.append(f"{what}: not finite")
    for index, row in enumerate(rows):
        known = [column for column, value in enumerate(row) if value is not None]
        if not known:
            continue
        values = torch.stack([row[column] for column in known])
        gaps = ((got[index, known] - values).abs().amax(-1) / (1 + values.abs().amax(-1))).tolist()
        wrong = [column for column, gap in zip(known, gaps) if not gap <= tolerance]
        if wrong:
            problems.append(f"{what}: row {index}, columns {_ranges(wrong)} off by up to {max(gaps):.2g}")


def naive_loss(logits: list[list], labels: list[list[int]]) -> tuple[float, int]:
    """Sum of the cross entropies of every labelled column, and their number."""
    total, count = 0.0, 0
    for values, wanted in zip(logits, labels):
        for column in range(len(wanted) - 1):
            if wanted[column + 1] != IGNORED:
                total += float(torch.logsumexp(values[column], 0) - values[column][wanted[column + 1]])
                count += 1
    return total, count


def _ranges(columns: list[int]) -> str:
    parts, start = [], columns[0]
    for column, after in zip(columns, [*columns[1:], None]):
        if after != column + 1:
            parts.append(f"{start}-{column}" if start != column else str(column))
            start = after
    return ",".join(parts[:6]) + (",..." if len(parts) > 6 else "")


def random_words(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(10, 80) for _ in range(rng.randint(low, high))]


__all__ = [
    "BOS",
    "CACHE",
    "FAMILIES",
    "IGNORED",
    "PAD",
    "Family",
    "Row",
    "View",
    "alone",
    "check_columns",
    "expand",
    "in_float64",
    "make_row",
    "make_rows",
    "naive_loss",
    "random_words",
    "short_positions",
]
