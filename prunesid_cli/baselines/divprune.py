"""DivPrune, diversity-based pruning, https://arxiv.org/abs/2503.02175.

The first token is the one furthest from its nearest other, each next one the furthest from all that are chosen, by the
cosine distance of projected tokens. This greedy answer to the max-min diversity problem is kept in raster order.
"""

from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import view_by_view


DEFAULTS: dict = {}
RULES: dict = {}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({"projected"})


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> torch.LongTensor:
    """The `count` tokens to keep of a view `(T, dim)`: their ascending indices."""
    return most_diverse(view if context.projected is None else context.projected, count)


def most_diverse(tokens: torch.Tensor, count: int) -> torch.LongTensor:
    """Ascending indices of `count` of the `(T, dim)` tokens, whose smallest distance is made large."""
    units = torch.nn.functional.normalize(tokens.float(), dim=-1)
    distances = 1 - units @ units.T
    to_others = distances + torch.diag(torch.full_like(distances[0], torch.inf))
    chosen = [to_others.min(1).values.argmax()]
    nearest = distances[chosen[0]].clone()
    for _ in range(count - 1):
        nearest[chosen[-1]] = -torch.inf
        chosen.append(nearest.argmax())
        nearest = nearest.minimum(distances[chosen[-1]])
    return torch.stack(chosen).sort().values
