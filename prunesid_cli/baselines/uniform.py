"""Uniform selection, a fixed stride over the image.

Of N equal runs of patches in raster order the middle one is kept. The image has no say in it.
"""

from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import view_by_view


DEFAULTS: dict = {}
RULES: dict = {}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset()


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> torch.LongTensor:
    """The `count` tokens to keep of a view `(T, dim)`: their ascending indices."""
    middles = (2 * torch.arange(count, device=view.device) + 1) * len(view)
    return middles // (2 * count)
