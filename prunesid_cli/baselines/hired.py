"""HiRED, high-resolution early dropping, https://arxiv.org/abs/2408.10945.

The N patches that the CLS token attends to most, summed over the heads of layer -2, in raster order. Its sharing of a
budget over crops has nothing to share in a model of one view an image.
"""

from .encoder import Kept, View, top


def choose(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its CLS attention.
        budget (`int`): N.
    """
    return view.keep(top(view.cls_attention, budget))
