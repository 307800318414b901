"""Random selection, the floor of every comparison.

N patches are drawn with a seed made of the image's own pixels, and kept in raster order. The same image so keeps the
same tokens in every run and in every batch.
"""

import zlib

import torch

from .encoder import Kept, View


def choose(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its pixels.
        budget (`int`): N.
    """
    seed = zlib.crc32(view.pixels.float().cpu().numpy().tobytes())
    order = torch.randperm(len(view.features), generator=torch.Generator().manual_seed(seed))
    return view.keep(order[:budget].sort().values.to(view.features.device))
