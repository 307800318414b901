"""Other ways to group tokens, to compare PSCA with (Table 5)."""

import math

import torch

from .exact import is_batched, product
from .similarity import Pairs


def group(name: str, pairs: Pairs, num_groups: int, own: int | torch.Tensor, seed: int) -> torch.LongTensor:
    """The groups `(views, tokens)` of `method_settings["grouping"]`, `"kmeans"` or `"random"`."""
    if name == "random":
        return random_groups(pairs.finite, own, seed)
    return kmeans_groups(pairs.features, pairs.finite, num_groups, own, seed)


def kmeans_groups(
    features: torch.Tensor, finite: torch.Tensor, num_groups: int, own: int | torch.Tensor, seed: int
) -> torch.Tensor:
    """
    Groups by 10 rounds of Lloyd's k-means on the features, from the first tokens of a seeded shuffle (Table 5).

    An empty group keeps its centre, and a token between two centres joins the lower group.

    Args:
        features (`torch.FloatTensor` of shape `(views, tokens, dim)`): zero where not finite.
        finite (`torch.BoolTensor` of shape `(views, tokens)`): which tokens count.
        num_groups (`int`): the largest K, at most `tokens`.
        own (`int` or `torch.LongTensor` of shape `(views, 1)`): K of each view.
        seed (`int`): seed of the shuffle.

    Returns:
        `torch.LongTensor` of shape `(views, tokens)`.
    """
    first = _shuffle(finite, seed)[:, :num_groups, None]
    centres = features.gather(1, first.expand(-1, -1, features.shape[2]))
    beyond = (torch.arange(num_groups, device=features.device) >= own).view(-1, 1, num_groups)
    for _ in range(10):
        distances = centres.square().sum(2)[:, None] - 2 * _product(features, centres.mT)
        groups = distances.masked_fill(beyond, math.inf).argmin(2)
        members = torch.nn.functional.one_hot(groups, num_groups) * finite[..., None]
        sizes = members.sum(1)[..., None]
        means = _product(members.mT.float(), features) / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return groups


def random_groups(finite: torch.Tensor, own: int | torch.Tensor, seed: int) -> torch.Tensor:
    """
    Groups of even size by a seeded shuffle, the same on every device (Table 5).

    Args:
        finite (`torch.BoolTensor` of shape `(views, tokens)`): which tokens count.
        own (`int` or `torch.LongTensor` of shape `(views, 1)`): K of each view.
        seed (`int`): seed of the shuffle.

    Returns:
        `torch.LongTensor` of shape `(views, tokens)`.
    """
    group = torch.arange(finite.shape[1], device=finite.device) % own
    return torch.empty_like(finite, dtype=torch.long).scatter(1, _shuffle(finite, seed), group.expand_as(finite))


def _shuffle(finite: torch.Tensor, seed: int) -> torch.Tensor:
    """A seeded permutation of the tokens of each view, drawn on the CPU, with the non-finite ones behind."""
    drawn = torch.randperm(finite.shape[1], generator=torch.Generator().manual_seed(seed))
    drawn = drawn.to(finite.device, non_blocking=True).expand_as(finite)
    return drawn.gather(1, (~finite.gather(1, drawn)).byte().argsort(dim=1, stable=True))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right if is_batched(left) else product(left[0], right[0])[None]
