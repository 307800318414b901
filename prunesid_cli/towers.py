"""A vision tower run by itself, for what looks into it."""

from collections.abc import Iterable

import torch
from torch import nn

from modeling_prunesid.tower import TowerStates, watch_tower


def run_tower(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    layers: Iterable[int],
    cls_attention_layer: int | None = None,
    **tower_arguments,
) -> TowerStates:
    """A tower by itself, watched as by [`watch_tower`], on `(batch, channels, height, width)`."""
    with watch_tower(tower, layers, cls_attention_layer) as states:
        tower(pixel_values, return_dict=True, **tower_arguments)
    return states
