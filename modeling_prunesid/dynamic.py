"""Dynamic budgets (section 3.4): views that show more keep more tokens."""

import math
from collections.abc import Sequence
from numbers import Real
from types import SimpleNamespace
from typing import Any

import torch

from .checks import check_integer, resolve_budget
from .context import Context, Selection, in_parts
from .similarity import compare


@torch.no_grad()
def redundancy(views: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    """
    Redundancy rho of each view: the mean cosine similarity over all pairs of its tokens (equations 4 and 5).

    Non-finite tokens are left out, a zero vector is similar to nothing, and fewer than two tokens have no redundancy.

    Args:
        views (`torch.Tensor` of shape `(views, tokens, dim)`): token features, any floating dtype.
        lengths (`list[int]`, *optional*): tokens of each view, where views are padded.

    Returns:
        `torch.FloatTensor` of shape `(views,)`.
    """

    def measure(views: torch.Tensor, counts: torch.LongTensor, settings: Any, context: Context) -> Selection:
        return Selection(counts[:, None], counts, rho=compare(views, None, context).rho)

    counts = torch.zeros(len(views), dtype=torch.long, device=views.device)
    return in_parts(measure)(views, counts, None, Context(counts=[0] * len(views), lengths=lengths)).rho


def information_budgets(
    rho: torch.Tensor,
    budget: int | float,
    num_tokens: int,
    reference: float,
    minimum: int | None = None,
    maximum: int | None = None,
) -> torch.LongTensor:
    """
    Budget N' of each image in proportion to its information 1 - rho (section 3.4, equation 7).

    N' = N * (1 - rho) / reference, rounded half up. With the mean information of a data set as the reference, the mean
    of N' over that data set is N.

    Args:
        rho (`torch.Tensor` of shape `(batch,)`): redundancy of each image, see [`redundancy`].
        budget (`int` or `float`): N at the reference: a count, or a share in (0, 1] of the tokens.
        num_tokens (`int`): tokens of each image.
        reference (`float`): information that receives exactly N.
        minimum, maximum (`int`, *optional*): bounds of N', by default 1 and `num_tokens`.

    Returns:
        `torch.LongTensor` of shape `(batch,)`, each in [1, `num_tokens`].

    Raises:
        ValueError: a budget, reference or bound that is not positive, or a minimum above the maximum.
    """
    if isinstance(reference, bool) or not isinstance(reference, Real) or not 0 < reference < math.inf:
        raise ValueError(f"`reference` must be a positive number, the mean of 1 - rho, got {reference!r}.")
    lowest, highest = 1, num_tokens
    if minimum is not None:
        check_integer("minimum", minimum, minimum=1)
        lowest = min(minimum, num_tokens)
    if maximum is not None:
        check_integer("maximum", maximum, minimum=1 if minimum is None else minimum)
        highest = min(maximum, num_tokens)
    budgets = resolve_budget(budget, num_tokens) * (1 - rho.double()) / reference
    return (budgets + 0.5).floor().clamp(lowest, highest).long()


def view_information(views: torch.Tensor, lengths: list[int], first_views: list[int]) -> list[float]:
    """
    The information score 1 - rho of each view (section 3.4).

    Args:
        views (`torch.Tensor` of shape `(views, tokens, dim)`), lengths (`list[int]`): features, padded.
        first_views (`list[int]`): which views are the first of an input.
    """
    return [1 - rho for rho in redundancy(views, lengths).tolist()]


def adjusted_budgets(
    settings: Any, views: torch.Tensor, lengths: list[int], nominal: Sequence[int], extra_kept: int
) -> list[int]:
    """N' of each view by `reference_information`, in place of its `nominal` N, with what is kept besides."""
    bounds = {"minimum": settings.min_budget, "maximum": settings.max_budget}
    rho = redundancy(views, lengths)
    adjusted = [
        information_budgets(rho[view], budget, length + extra_kept, settings.reference_information, **bounds)
        for view, (budget, length) in enumerate(zip(nominal, lengths))
        if length
    ]
    found = iter(torch.stack(adjusted).tolist())
    return [next(found) if length else 0 for length in lengths]


@torch.compiler.disable
def share_by_weight(count: int, weights: Sequence[float], num_tokens: Sequence[int], shares: list[int]) -> list[int]:
    """`shares` and `count` more tokens, each for the view that is furthest behind, which is Webster's method."""
    weights = [max(weight, torch.finfo(torch.float32).eps) for weight in weights]
    for _ in range(count):
        not_full = [view for view, tokens in enumerate(num_tokens) if shares[view] < tokens]
        shares[max(not_full, key=lambda view: weights[view] / (shares[view] + 0.5))] += 1
    return shares


# What the model's code needs for dynamic budgets; a repository whose budget is fixed goes without this file.
PARTS = SimpleNamespace(information=view_information, adjusted=adjusted_budgets, share_by_weight=share_by_weight)
