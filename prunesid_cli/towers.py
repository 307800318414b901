"""A vision tower run by itself, for what looks into it."""

from collections.abc import Iterable

import torch
from torch import nn

from modeling_prunesid.cls_attention import Projections, watch_cls
from modeling_prunesid.tower import watch_tower


def run_tower(
    tower: nn.Module, pixel_values: torch.Tensor, layers: Iterable[int], **tower_arguments
) -> dict[int, torch.Tensor]:
    """Hidden states of a tower by itself, as of [`watch_tower`], on `(batch, channels, height, width)`."""
    with watch_tower(tower, layers) as states:
        tower(pixel_values, return_dict=True, **tower_arguments)
    return states


def run_tower_with_cls(
    tower: nn.Module, pixel_values: torch.Tensor, layers: Iterable[int], cls_layer: int
) -> tuple[dict[int, torch.Tensor], Projections]:
    """As [`run_tower`], with what [`watch_cls`] reads of a layer."""
    with watch_cls(tower, cls_layer) as found:
        states = run_tower(tower, pixel_values, [*layers, cls_layer])
    return states, found
