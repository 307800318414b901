"""A vision tower run by itself, for what looks into it."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling_prunesid.cls_attention import cls_attention, watch_cls
from modeling_prunesid.tower import watch_tower


@dataclass
class TowerStates:
    """
    Args:
        hidden_states (`dict[int, torch.Tensor]`): `(batch, tokens, dim)` by index, 0 being the embeddings.
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`, *optional*):
            What the projections of the layer of CLS gave, the heads side by side.
        cls_attention (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
            The attention weights of the CLS query there, summed over the heads, in float32.
    """

    hidden_states: dict[int, torch.Tensor]
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None


def run_tower(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    layers: Iterable[int],
    cls_attention_layer: int | None = None,
    **tower_arguments,
) -> TowerStates:
    """
    A tower by itself, watched as by [`watch_tower`], on `(batch, channels, height, width)`; with `cls_attention_layer`
    also as by [`watch_cls`].
    """
    of_cls: Any = nullcontext([])
    if cls_attention_layer is not None:
        of_cls, layers = watch_cls(tower, cls_attention_layer), [*layers, cls_attention_layer]
    with watch_tower(tower, layers) as states, of_cls as projections:
        tower(pixel_values, return_dict=True, **tower_arguments)
    if not projections:
        return TowerStates(states)
    return TowerStates(states, *projections, cls_attention(*projections, tower.config.num_attention_heads))
