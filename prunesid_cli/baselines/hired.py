"""HiRED, high-resolution early dropping, https://arxiv.org/abs/2408.10945.

The N patches that the CLS token attends to most, summed over the heads of layer -2, in raster order. A budget is that
of each view: its sharing of a budget over crops is left out.
"""

from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import highest, view_by_view


DEFAULTS: dict = {}
RULES: dict = {}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({"cls_attention"})


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> torch.LongTensor:
    """The `count` tokens to keep of a view `(T, dim)`: their ascending indices."""
    return highest(context.attention, count)
