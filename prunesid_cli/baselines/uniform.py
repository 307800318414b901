"""Uniform selection, a fixed stride over the image.

Of N equal runs of patches in raster order the middle one is kept. The image has no say in it.
"""

import torch

from .encoder import Kept, View


def choose(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its number of patches.
        budget (`int`): N.
    """
    middles = (2 * torch.arange(budget, device=view.features.device) + 1) * len(view.features)
    return view.keep(middles // (2 * budget))
