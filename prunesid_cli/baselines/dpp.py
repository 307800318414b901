"""Selection by a determinantal point process, question-blind: the likeliest set of projected tokens.

A set is the likelier the larger the volume that its unit vectors span: L = cosine similarities. The greedy answer is
that of Chen et al. (https://arxiv.org/abs/1709.05135), whose every step takes the token furthest from the span of
those chosen. It is CDPruner's selection without its question. Kept in raster order.
"""

from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import view_by_view


DISTINCT = 1e-9  # squared distances from the span of what is chosen that differ by less are equal

DEFAULTS: dict = {}
RULES: dict = {}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({"projected"})


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> torch.LongTensor:
    """The `count` tokens to keep of a view `(T, dim)`: their ascending indices."""
    return likeliest(similarities(view if context.projected is None else context.projected), count)


def similarities(tokens: torch.Tensor) -> torch.Tensor:
    """Cosine similarities `(T, T)` of tokens `(T, dim)`, in float64."""
    units = torch.nn.functional.normalize(tokens.double(), dim=-1)
    return units @ units.T


def likeliest(kernel: torch.Tensor, count: int) -> torch.LongTensor:
    """
    Ascending indices of `count` tokens, chosen greedily for the largest determinant of their part of a kernel.

    Args:
        kernel (`torch.Tensor` of shape `(T, T)`): symmetric, without negative eigenvalues, float64.
        count (`int`): of equal tokens, and once the chosen span all others, the lower indices follow.
    """
    outside, spanned = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel))
    chosen: list[torch.Tensor] = []
    for step in range(count):
        gains = (outside / DISTINCT).round()
        best = gains.argmax()
        if gains[best] > 0:
            along = kernel[best] - spanned[:step, best] @ spanned[:step]
            spanned[step] = along / outside[best].sqrt()
            outside = (outside - spanned[step].square()).clamp(min=0).where(outside >= 0, outside)
        outside[best] = -torch.inf
        chosen.append(best)
    return torch.stack(chosen).sort().values
