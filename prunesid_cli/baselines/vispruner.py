"""VisPruner, visual cues, https://arxiv.org/abs/2412.01818.

Half of the tokens, rounded down, are those that the CLS token attends to most in layer -2. The others are what remains
when duplicates are removed from the rest, in rounds: ordered by attention, every second token is compared with those
between, by the cosine of tower features, and the 8 that have the most similar partner go. Kept in raster order.
"""

import torch

from .encoder import Kept, View


IMPORTANT_SHARE = 0.5
REMOVED_A_ROUND = 8


def choose(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its CLS attention and features.
        budget (`int`): N.
    """
    num_important = int(IMPORTANT_SHARE * budget)
    by_attention = view.cls_attention.argsort(descending=True, stable=True)
    rest = without_duplicates(view.features, by_attention[num_important:], budget - num_important)
    return view.keep(torch.cat([by_attention[:num_important], rest]).sort().values)


def without_duplicates(features: torch.Tensor, indices: torch.LongTensor, count: int) -> torch.LongTensor:
    """The `count` of `indices` that remain when the most similar ones are removed round after round."""
    units = torch.nn.functional.normalize(features.float(), dim=-1)
    while len(indices) > count:
        compared, others = indices[::2], indices[1::2]
        closest = (units[compared] @ units[others].T).max(1).values
        removed = min(REMOVED_A_ROUND, len(indices) - count)
        indices = torch.cat([compared[closest.argsort(descending=True, stable=True)[removed:]], others])
    return indices
