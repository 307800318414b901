"""MustDrop, tokens dropped in several stages, https://arxiv.org/abs/2411.10803.

In the vision tower, behind its first layer, each window of 3 x 3 patches whose mean cosine similarity is 0.8 or more
becomes its mean. The 8% of the remaining tokens that the CLS token attends to most in the last layer are key tokens,
which are never dropped. Behind layers 2, 6, 10 and 14 of 32 of the language model, a visual token goes if it is below
two thresholds: its share of all the attention that the text behind the image pays to visual tokens, and the most that
any one word pays it, mean over heads.

The published thresholds leave means of 192, 128 and 64 tokens in LLaVA-1.5-7B and other numbers elsewhere, as they
are weights of its attention. So both are scaled by one factor for each prompt and layer (ours), which leaves as many
tokens as make the mean N in 32 layers, where each filter leaves the same share of them; the pair is that of the
published budget nearest to N. The layers scale with the depth of the language model, and of those that fall together
the last remains. Tokens are in raster order and keep their positions, a mean has the place of its window's middle, and
each image is merged by itself (the release merges as many windows in every image of a batch, and puts the means
first). The last stage, which shortens caches once the prompt is read, is left out: it changes no layer of the prompt.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch

from modeling_prunesid.single_views import highest
from prunesid_cli.towers import run_tower_with_cls

from .encoder import Kept, num_patches
from .llm import STATED_LAYERS, Row
from .tome import find_blocks


WINDOW = 3
SIMILARITY = 0.8
KEY_SHARE = 0.08
LAYERS = (3, 7, 11, 15)  # in front of which tokens are dropped: behind 2, 6, 10 and 14, counted from 0
PUBLISHED_PATCHES = 576
PUBLISHED_THRESHOLDS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}


class Stage(NamedTuple):
    """
    Args:
        budget (`int`): N of an image.
        number (`int`): of the filter, from 1.
        thresholds (`tuple[float, float]`): the least share of all attention, and the least weight of one word.
    """

    budget: int
    number: int
    thresholds: tuple[float, float]


def plan(budget: int, patches: int) -> dict[int, Stage]:
    published = budget * PUBLISHED_PATCHES / patches
    thresholds = PUBLISHED_THRESHOLDS[min(PUBLISHED_THRESHOLDS, key=lambda known: abs(known - published))]
    return {layer: Stage(budget, number, thresholds) for number, layer in enumerate(LAYERS, 1)}


def encode(base_model: Any, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
    """
    Args:
        base_model: LLaVA with a tower that has a CLS token, CLIP or DINOv2.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`).
        layers (`list[int]`): the feature layers, not the embeddings.
        budget (`int`): not asked for here.
    """
    tower, depth = base_model.vision_tower, base_model.vision_tower.config.num_hidden_layers
    patches, columns = num_patches(tower, pixel_values), pixel_values.shape[-1] // tower.config.patch_size
    merged: list[torch.LongTensor] = []

    def merge(module, args, output):
        tokens, places = merge_windows(output[0, -patches:], columns)
        merged.append(places)
        return torch.cat([output[:, :-patches], tokens[None]], dim=1)

    handle = find_blocks(tower)[0].register_forward_hook(merge)
    try:
        images = [run_tower_with_cls(tower, image[None], layers, depth) for image in pixel_values]
    finally:
        handle.remove()
    kept = []
    for (states, cls), places in zip(images, merged):
        features = torch.cat([states[layer] for layer in layers], dim=-1)[0, -len(places) :]
        is_key = torch.zeros_like(places, dtype=torch.bool)
        is_key[highest(cls.cls_attention[0, -len(places) :], math.ceil(KEY_SHARE * len(places)))] = True
        kept.append(Kept(features, places, is_key))
    return kept


def merge_windows(tokens: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Merges windows of similar patches. Rows and columns that fill no window stay as they are.

    Args:
        tokens (`torch.Tensor` of shape `(T, dim)`): in raster order.
        columns (`int`): patches in a row.

    Returns:
        The tokens that are left, and the ascending patch that each stands for.
    """
    grid, size = torch.arange(len(tokens), device=tokens.device).view(-1, columns), WINDOW**2
    down, across = (side // WINDOW for side in grid.shape)
    grid = grid[: down * WINDOW, : across * WINDOW].reshape(down, WINDOW, across, WINDOW)
    windows = grid.transpose(1, 2).reshape(down * across, size)
    units = torch.nn.functional.normalize(tokens.float(), dim=-1)[windows]
    similarity = (units @ units.transpose(1, 2)).sum((1, 2)) - units.square().sum((1, 2))
    alike = windows[similarity / (size * (size - 1)) >= SIMILARITY]
    middles = alike[:, size // 2]
    merged = tokens.index_copy(0, middles, tokens[alike].float().mean(1).to(tokens.dtype))
    is_left = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    is_left[alike.flatten()] = False
    is_left[middles] = True
    return merged[is_left], is_left.nonzero()[:, 0]


def choose(row: Row, setting: Stage) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Args:
        row (`Row`): for its attention and its key tokens.
        setting (`Stage`): the thresholds are met by `margins` of 1 and more.
    """
    entered = len(row.entered)
    share = filter_share(setting.budget * row.num_images / entered)
    count = round(entered * share**setting.number)
    above = margins(row.attention(row.readers)[:, row.visual], setting.thresholds)
    above = above.masked_fill(row.is_key, torch.inf)
    return row.keep(row.visual[highest(above, max(count, int(row.is_key.sum()), 1))])


def margins(attention: torch.Tensor, thresholds: tuple[float, float]) -> torch.Tensor:
    """By what factor both thresholds could be raised for each visual token to stay, from `(words, tokens)` weights."""
    least_share, least_weight = thresholds
    total = attention.sum(0)
    return torch.maximum(total / total.sum() / least_share, attention.amax(0) / least_weight)


def filter_share(target: float) -> float:
    """The share of its tokens that each filter leaves, such that the mean over 32 layers is `target` of all."""
    spans = [end - start for start, end in itertools.pairwise((0, *LAYERS, STATED_LAYERS))]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        mean = sum(span * middle**stage for stage, span in enumerate(spans)) / STATED_LAYERS
        low, high = (middle, high) if mean < target else (low, middle)
    return high
