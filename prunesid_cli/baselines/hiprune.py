"""HiPrune, hierarchical attention, https://arxiv.org/abs/2508.00553.

By the attention that patches receive, mean over heads and over all queries, three kinds of tokens are kept: anchors,
the best of a middle layer, in which attention lies on objects; buffers, the four neighbours of each anchor; and
registers, the best others of layer -2. Anchors and buffers are about alpha = 0.1 of all. Kept in raster order.

The middle layer is the published 9th of CLIP's 24, at the same depth of other towers: the 5th of 12. As in the
release, neighbours are counted along the raster, so that those of a patch at an edge may lie on the next row. It looks
into two layers of the tower, and so does not choose by one finished view as the package's methods do.
"""

from contextlib import ExitStack
from typing import Any

import torch

from modeling_prunesid.layers import resolve_layer
from modeling_prunesid.single_views import highest
from prunesid_cli.towers import run_tower

from .encoder import Kept, num_patches
from .tome import find_blocks


ALPHA = 0.1
MIDDLE_LAYER, STATED_LAYERS = 9, 24


def encode(base_model: Any, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
    """
    Args:
        base_model: LLaVA with a tower whose attention has query and key projections.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`).
        layers (`list[int]`): the feature layers.
        budget (`int`): N.
    """
    tower, settings = base_model.vision_tower, base_model.config.prunesid_config
    num_layers = tower.config.num_hidden_layers
    middle = max(1, int(MIDDLE_LAYER * num_layers / STATED_LAYERS + 0.5))
    deep = resolve_layer(settings.layer, num_layers, "prunesid_config.layer")
    captured: dict[tuple[int, str], torch.Tensor] = {}
    with ExitStack() as stack:
        for layer in {middle, deep}:
            for name, module in _projections(find_blocks(tower)[layer - 1]).items():
                stack.callback(module.register_forward_hook(_keeping(captured, (layer, name))).remove)
        states = run_tower(tower, pixel_values, [*layers, middle, deep])
    features = torch.cat([states[layer] for layer in layers], dim=-1)
    patches = num_patches(tower, pixel_values)
    scores = [
        received_attention(captured[layer, "query"], captured[layer, "key"], tower.config.num_attention_heads)
        for layer in (middle, deep)
    ]
    columns = pixel_values.shape[-1] // tower.config.patch_size
    kept = []
    for view, objects, all_over in zip(features, *scores):
        indices = select(objects[-patches:], all_over[-patches:], columns, budget)
        kept.append(Kept(view[-patches:][indices], indices))
    return kept


def select(objects: torch.Tensor, all_over: torch.Tensor, columns: int, budget: int) -> torch.LongTensor:
    """
    Args:
        objects, all_over (`torch.Tensor` of shape `(T,)`): attention received in the middle and in the deep layer.
        columns (`int`): patches in a row of the image.
        budget (`int`): N.

    Returns:
        Ascending indices `(N,)`.
    """
    anchors = highest(objects, round(budget * ALPHA / 5))
    around = torch.tensor([0, -1, 1, -columns, columns], device=anchors.device)
    near = (anchors[:, None] + around).clamp(0, len(objects) - 1).unique()
    scores = all_over.index_fill(0, near, -torch.inf)
    return torch.cat([near, highest(scores, budget - len(near))]).sort().values


def received_attention(queries: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The weights that each of the tokens `(batch, tokens, width)` receives, mean over heads and queries."""
    queries, keys = (part.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (queries, keys))
    return (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1).mean((1, 2))


def _projections(block: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = {name.rsplit(".", 1)[-1]: module for name, module in block.named_modules()}
    return {"query": modules.get("q_proj") or modules["query"], "key": modules.get("k_proj") or modules["key"]}


def _keeping(captured: dict, place: tuple[int, str]):
    def hook(module, args, output):
        captured[place] = output

    return hook
