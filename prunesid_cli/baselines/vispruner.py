"""VisPruner, visual cues, https://arxiv.org/abs/2412.01818.

Half of the tokens, rounded down, are those that the CLS token attends to most in layer -2. The others are what remains
when duplicates are removed from the rest, in rounds: ordered by attention, every second token is compared with those
between, by the cosine of tower features, and the 8 that have the most similar partner go. Kept in raster order.
"""

from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import view_by_view


IMPORTANT_SHARE = 0.5
REMOVED_A_ROUND = 8

DEFAULTS: dict = {}
RULES: dict = {}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({"cls_attention", "features"})


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> torch.LongTensor:
    """The `count` tokens to keep of a view `(T, dim)`: their ascending indices."""
    num_important = int(IMPORTANT_SHARE * count)
    by_attention = context.attention.argsort(descending=True, stable=True)
    rest = without_duplicates(context.features, by_attention[num_important:], count - num_important)
    return torch.cat([by_attention[:num_important], rest]).sort().values


def without_duplicates(features: torch.Tensor, indices: torch.LongTensor, count: int) -> torch.LongTensor:
    """The `count` of `indices` that remain when the most similar ones are removed round after round."""
    units = torch.nn.functional.normalize(features.float(), dim=-1)
    while len(indices) > count:
        compared, others = indices[::2], indices[1::2]
        closest = (units[compared] @ units[others].T).max(1).values
        removed = min(REMOVED_A_ROUND, len(indices) - count)
        indices = torch.cat([compared[closest.argsort(descending=True, stable=True)[removed:]], others])
    return indices
