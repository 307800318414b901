"""ToMe, token merging inside the vision tower, https://arxiv.org/abs/2210.09461.

In every block, between attention and MLP, the tokens of even place are matched with the most similar of odd place, by
their keys averaged over the heads, and the r best pairs become their size-weighted mean. Attention is proportional:
the logarithm of a token's size is added to the logits of its key.

r is the same in all blocks up to the feature layer, but for rounding, and leaves N of the T patches. Where more than
half of a block's tokens would have to go, earlier blocks merge more. CLS is never merged. What remains is sorted by
the patches that others were merged into.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from prunesid_cli.towers import run_tower

from .encoder import Kept, num_patches, replaced


def encode(base_model: Any, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
    """
    Args:
        base_model: LLaVA with a tower of pre-norm blocks, CLIP or DINOv2, whose attention takes a mask.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`).
        layers (`list[int]`): the feature layer; there can be only one.
        budget (`int`): N.

    Raises:
        `ValueError`: for several feature layers, or a tower that ToMe cannot shorten to N.
    """
    tower = base_model.vision_tower
    if len(layers) != 1:
        raise ValueError(f"vision_feature_layer must be a single layer for ToMe, got {layers}.")
    patches = num_patches(tower, pixel_values)
    blocks = find_blocks(tower)[: layers[0]]
    merging = Merging(len(pixel_values), 1 + patches, pixel_values.device)
    with ExitStack() as stack:
        for block, count in zip(blocks, schedule(patches, budget, len(blocks))):
            stack.enter_context(replaced(block, "forward", merging.forward_of(block, count)))
        states = run_tower(tower, pixel_values, layers)
    features, places = states[layers[0]][:, 1:], merging.places[:, 1:] - 1
    order = places.argsort(1)
    return [Kept(view[rows], place[rows]) for view, place, rows in zip(features, places, order)]


def find_blocks(tower: nn.Module) -> list[nn.Module]:
    count = tower.config.num_hidden_layers
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0])


def schedule(patches: int, budget: int, num_blocks: int) -> list[int]:
    """
    How many tokens each block merges away: at most half of those it has, `patches - budget` in all.

    Raises:
        `ValueError`: if the blocks are too few for that.
    """
    counts = []
    for left in range(num_blocks, 0, -1):
        count = max(math.ceil((patches - budget) / left), patches - budget * 2 ** (left - 1))
        counts.append(min(count, patches // 2))
        patches -= counts[-1]
    if patches != budget:
        raise ValueError(
            f"budget={budget} is too small for ToMe in {num_blocks} blocks, which leave {patches} tokens."
        )
    return counts


class Merging:
    """The tokens of a batch on their way through the blocks: `sizes` `(batch, n)` and `places` `(batch, n)`."""

    def __init__(self, batch: int, tokens: int, device: torch.device):
        self.sizes = torch.ones(batch, tokens, device=device)
        self.places = torch.arange(tokens, device=device).expand(batch, -1)

    def forward_of(self, block: nn.Module, count: int) -> Callable:
        """The forward of a pre-norm block that merges `count` tokens away between its attention and its MLP."""
        parts = dict(block.named_children())
        names = _CLIP if "self_attn" in parts else _DINOV2
        identity = nn.Identity()
        norm1, attention, scale1, norm2, mlp, scale2 = (parts.get(name, identity) for name in names)
        modules = {name.rsplit(".", 1)[-1]: module for name, module in attention.named_modules()}
        key_projection = modules.get("k_proj") or modules["key"]
        num_heads = attention.config.num_attention_heads

        def forward(hidden_states, *args, **kwargs):
            captured: list[torch.Tensor] = []
            handle = key_projection.register_forward_hook(lambda module, args, output: captured.append(output))
            bias = self.sizes.log().to(hidden_states.dtype)[:, None, None]
            try:
                attended = attention(norm1(hidden_states), attention_mask=bias)[0]
            finally:
                handle.remove()
            hidden_states = hidden_states + scale1(attended)
            if count:
                metric = captured[0].float().unflatten(-1, (num_heads, -1)).mean(2)
                hidden_states = self.merge(hidden_states, metric, count)
            return hidden_states + scale2(mlp(norm2(hidden_states)))

        return forward

    def merge(self, hidden_states: torch.Tensor, metric: torch.Tensor, count: int) -> torch.Tensor:
        source, target, rest = match(metric, count)
        batch = torch.arange(len(source), device=source.device)[:, None]
        sums = hidden_states.float() * self.sizes[..., None]
        sums = sums.scatter_add(1, target[..., None].expand(-1, -1, sums.shape[-1]), sums[batch, source])
        sizes = self.sizes.scatter_add(1, target, self.sizes[batch, source])
        self.sizes, self.places = sizes[batch, rest], self.places[batch, rest]
        return (sums[batch, rest] / self.sizes[..., None]).to(hidden_states.dtype)


# Norm, attention and scale, norm, MLP and scale of a block.
_CLIP = ("layer_norm1", "self_attn", "no scale", "layer_norm2", "mlp", "no scale")
_DINOV2 = ("norm1", "attention", "layer_scale1", "norm2", "mlp", "layer_scale2")


def match(metric: torch.Tensor, count: int) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """
    Bipartite soft matching of `(batch, n, dim)` tokens, of which the first is not merged.

    Returns:
        `(batch, count)` tokens that go, the tokens that they go into, and `(batch, n - count)` that remain: those of
        even place, then those of odd place.
    """
    tokens = metric.shape[1]
    units = torch.nn.functional.normalize(metric, dim=-1)
    similarity = units[:, ::2] @ units[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(dim=1, descending=True, stable=True)
    source, unmerged = order[:, :count], order[:, count:].sort(1).values
    target = 2 * partner.gather(1, source) + 1
    odd = torch.arange(1, tokens, 2, device=metric.device).expand(len(metric), -1)
    return 2 * source, target, torch.cat([2 * unmerged, odd], dim=1)
