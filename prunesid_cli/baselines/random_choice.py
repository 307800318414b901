"""Random selection, the floor of every comparison.

N tokens are drawn with a seed made of the image itself, and kept in raster order. The seed is where in the image some
of the features are largest and smallest, which rounding does not move: so the same image keeps the same tokens in
every run and in every batch.
"""

import zlib
from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import view_by_view


CHANNELS = 4

DEFAULTS: dict = {}
RULES: dict = {}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset()


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> torch.LongTensor:
    """The `count` tokens to keep of a view `(T, dim)`: their ascending indices."""
    channels = view[:, :: max(view.shape[1] // CHANNELS, 1)]
    places = torch.cat([channels.argmax(0), channels.argmin(0)]).tolist()
    generator = torch.Generator().manual_seed(zlib.crc32(repr(places).encode()))
    return torch.randperm(len(view), generator=generator)[:count].sort().values.to(view.device)
