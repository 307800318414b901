"""DivPrune, diversity-based pruning, https://arxiv.org/abs/2503.02175.

The first token is the one furthest from its nearest other, each next one the furthest from all that are chosen, by the
cosine distance of projected tokens. This greedy answer to the max-min diversity problem is kept in raster order.
"""

import torch

from .encoder import Kept, View


def choose(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its features and the projector.
        budget (`int`): N.
    """
    return view.keep(most_diverse(view.project(view.features), budget))


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
