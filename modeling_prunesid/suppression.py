"""Which kept or surviving token suppressed another one (section 3.3), to be shown. It does not travel."""

from typing import Any

import torch

from .context import Context, Selection
from .selection import LAMBDA_OF_A_SHARE, survivors
from .similarity import compare


WITH_NMS = ("paper", "release")  # the methods that suppress by a threshold
BISECTIONS = 16  # of `nms_lambda="auto"`, as in `survivors_of_smallest_tau`


@torch.no_grad()
def find_suppressors(
    view: torch.Tensor, selection: Selection, settings: Any, context: Context
) -> tuple[float, torch.LongTensor] | None:
    """
    The threshold tau of one view, and what suppressed each of its tokens.

    Args:
        view (`torch.Tensor` of shape `(1, tokens, dim)`): what was compared, without padding.
        selection ([`Selection`]): of this view alone, with groups and scores.
        settings (`PruneSIDConfig`), context ([`Context`]): those of the choice.

    Returns:
        tau, and `(tokens,)` the first survivor of the token's group, by score, that is at least tau similar to it; -1
        for a survivor. None for a method without suppression.
    """
    if settings.method not in WITH_NMS:
        return None
    tokens, count = view.shape[1], int(selection.counts[0])
    chosen: Any = selection
    pairs = compare(view, None, context)
    ranking = chosen.scores.argsort(dim=1, descending=True, stable=True)
    members = chosen.groups.masked_fill(chosen.groups < 0, tokens)
    order = ranking.gather(1, members.gather(1, ranking).argsort(dim=1, stable=True))
    members = members.gather(1, order)
    similarity, valid = pairs.similarity(order, members), members < tokens
    factor, nominal = settings.nms_lambda, count + context.extra_kept
    if factor == "auto":
        tau = _smallest_tau(similarity, valid, count)
    else:
        if factor is None:
            factor = nominal * LAMBDA_OF_A_SHARE / tokens if context.lambda_of_share else nominal / 32
        tau = factor * pairs.rho[:, None]
    alive = survivors(similarity, tau)[:, 0] & valid
    rivals = ((similarity >= tau[..., None]) & alive[:, None])[0].tril(-1)  # row: token, column: a better survivor
    first = rivals.byte().argmax(1)
    is_suppressed = rivals.any(1) & valid[0]
    suppressors = torch.full_like(order[0], -1)
    suppressors[order[0]] = torch.where(is_suppressed, order[0, first], -1)
    return float(tau), suppressors


def _smallest_tau(similarity: torch.Tensor, valid: torch.Tensor, count: int) -> torch.Tensor:
    """The tau `(1, 1)` of `survivors_of_smallest_tau`; above all similarities where none leaves enough."""
    low, width = torch.full_like(similarity[:, 0, :1], -1.0), 1.0
    found = low + 2 * width
    for _ in range(BISECTIONS):
        trial = survivors(similarity, low + width)[:, 0] & valid
        if int(trial.sum()) >= count:
            found = low + width
        else:
            low = low + width
        width /= 2
    return found
