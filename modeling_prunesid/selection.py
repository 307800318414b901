"""PruneSID token selection ("Prune Redundancy, Preserve Essence", section 3): which visual tokens of a view to keep.

The steps in the paper's order, each one function, for all views (images, crops, frames) at once:

1. PSCA (section 3.2, equations 1-3): `principal_components` over the *token* axis; each token joins its strongest one.
2. Redundancy (equations 4-5): `compare`, the mean cosine similarity over all pairs of tokens.
3. NMS (section 3.3): `survivors`, in each group a token too similar to a better one is suppressed.
4. Quotas (equation 6): `proportional_quotas`; each group contributes its best survivors.
5. Dynamic budgets (section 3.4, equation 7) have a file of their own: `dynamic.py`.

It works on tensors and knows no model. Nothing is random, and the host waits for nothing: what it must know, the
counts and lengths, it is told. A CPU takes one view at a time, each at its own length, and others 32: so a view gets
the same tokens alone and in any batch, and memory is bounded.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .components import principal_components
from .context import Context, Selection, are_equal, largest
from .exact import is_batched
from .parts import GROUPING
from .similarity import Pairs, compare


NMS_ROUNDS = 31
SCORES = ("component", "cls_attention", "attention")
NEVER_SIMILAR = 1.001  # above any cosine similarity with its rounding error
LAMBDA_OF_A_SHARE = 576 / 32  # N/32 of section 3.3 was tuned where N is of 576 tokens


def select_by_groups(
    views: torch.Tensor,
    counts: torch.LongTensor,
    settings: Any,
    context: Context,
    score: str,
    center: str,
    share_out: Callable[..., torch.Tensor],
    grouping: str = "psca",
    seed: int = 0,
) -> Selection:
    """
    PSCA groups, NMS and quotas: the paper, and its authors' release with other scores, means and quotas.

    Ties go to the lower token and the lower component. If NMS leaves fewer than N tokens, the suppressed ones of
    highest score fill up. A token with a non-finite feature (or attention) takes no part in means, similarities or
    groups: it ranks behind all others.

    Args:
        views, counts, settings, context: as every method's.
        score (`"component"`, `"cls_attention"` or `"attention"`), center (`"tokens"` or `"features"`).
        share_out: function of survivors and of tokens of each group `(views, groups)`, N and the N of bounds
            `(views, 1)` and T, that returns quotas. A group contributes its survivors before the others.
        grouping (`"psca"`, `"kmeans"` or `"random"`), seed (`int`).
    """
    tokens, most = views.shape[1], largest(context)
    if most == tokens and not is_batched(views) and not context.details:
        return Selection(torch.arange(tokens)[None], counts, compare(views, None, context).rho)
    attention = None if score == "component" else context.attention.float()
    pairs = compare(views, attention, context)
    nominal = counts[:, None] + context.extra_kept
    num_groups, own = groups_of(counts, pairs.lengths, settings, context, tokens)
    scores, groups = strongest_components(pairs, num_groups, own, center)
    if grouping != "psca":
        groups = GROUPING(grouping, pairs, num_groups, own, seed)
    scores = scores if attention is None else attention
    scores = scores if context.relevance is None else scores * context.relevance
    scores = scores.masked_fill(~pairs.finite, -math.inf)

    # Non-finite tokens come last in the ranking and form a group of their own behind the others.
    ranking = scores.argsort(dim=1, descending=True, stable=True)
    members = groups.masked_fill(~pairs.finite, num_groups)
    order = ranking.gather(1, members.gather(1, ranking).argsort(dim=1, stable=True))
    members = members.gather(1, order)
    finite = alive = members < num_groups
    factor = settings.nms_lambda
    if factor is None:
        factor = nominal * LAMBDA_OF_A_SHARE / pairs.lengths if context.lambda_of_share else nominal / 32
    if factor == "auto":
        alive = survivors_of_smallest_tau(pairs.similarity(order, members), alive, counts[:, None])
    else:
        tau = factor * pairs.rho[:, None]
        if is_batched(views) or tau < NEVER_SIMILAR:
            alive = alive & survivors(pairs.similarity(order, members), tau)[:, 0]

    none = torch.zeros(views.shape[0], num_groups + 1, dtype=torch.long, device=views.device)
    sizes, held = (none.scatter_add(1, members, marked.long()) for marked in (alive, finite))
    quotas = share_out(sizes, held, counts[:, None], nominal, tokens)
    suppressed, behind = finite & ~alive, held - sizes
    place = torch.where(  # in the group, from 1: survivors by score, then the suppressed
        alive,
        alive.cumsum(1) - (sizes.cumsum(1) - sizes).gather(1, members),
        suppressed.cumsum(1) - (behind.cumsum(1) - behind - sizes).gather(1, members),
    )
    kept = torch.zeros_like(alive).scatter(1, order, finite & (place <= quotas.gather(1, members)))

    spare = ~kept.gather(1, ranking)
    filled = spare & (spare.cumsum(1) <= counts[:, None] - quotas.sum(1, keepdim=True))
    kept = kept | torch.zeros_like(kept).scatter(1, ranking, filled)
    groups = groups.masked_fill(~pairs.finite, -1) if context.details else None
    return kept_tokens(kept, counts, context, pairs.rho, groups, scores)


def groups_of(
    counts: torch.LongTensor, lengths: torch.LongTensor, settings: Any, context: Context, tokens: int
) -> tuple[int, int | torch.LongTensor]:
    """K: the largest of all views, and that of each view, `(views, 1)` where they may differ. N/4 by default."""
    if settings.num_groups is not None:
        return min(settings.num_groups, tokens), lengths.clamp(max=settings.num_groups)
    most = min(max((largest(context) + context.extra_kept) // 4, 1), tokens)
    if are_equal(context):
        return most, most
    return most, ((counts[:, None] + context.extra_kept) // 4).clamp(min=1).minimum(lengths)


def strongest_components(
    pairs: Pairs, num_groups: int, own: int | torch.LongTensor, center: str
) -> tuple[torch.Tensor, torch.LongTensor]:
    """|V| `(views, tokens)` of each token's strongest component, and which one that is (equation 3)."""
    components = principal_components(pairs.features, pairs.finite, num_groups, center, pairs.lengths)
    if isinstance(own, torch.Tensor) and is_batched(components):
        components = components * (torch.arange(num_groups, device=own.device) < own[..., None])
    return components.max(-1)


def kept_tokens(
    kept: torch.Tensor,
    counts: torch.LongTensor,
    context: Context,
    rho: torch.Tensor,
    groups: torch.Tensor | None,
    scores: torch.Tensor,
) -> Selection:
    """The selection of the tokens `(views, tokens)` that `kept` marks, N of each view."""
    tokens = kept.shape[1]
    indices = (~kept).byte().argsort(dim=1, stable=True)[:, : largest(context)]
    selection = Selection(indices, counts, rho, groups, scores if context.details else None)
    if not are_equal(context):
        selection.indices = indices.masked_fill(~selection.mask, tokens)
    return selection


def survivors(similarity: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """
    Greedy NMS (section 3.3): a token survives unless its similarity to a better survivor of its group reaches tau.

    Each round decides again from the round before. A token whose better rivals are settled is settled, so that the
    rounds end at the greedy answer. Where the host must not look whether they have, 31 rounds are made: exact for
    chains of up to 31 tokens, each suppressed by the one before. Of a longer chain, what is not settled counts as
    suppressed, for an odd round leaves only tokens of the greedy answer: never two in conflict.

    Args:
        similarity (`torch.FloatTensor` of shape `(views, tokens, tokens)`):
            of tokens sorted by group, the best first; -inf between groups.
        tau (`torch.FloatTensor` of shape `(views, thresholds)`): one threshold of one view on a CPU.

    Returns:
        `torch.BoolTensor` of shape `(views, thresholds, tokens)`, in the order of the rows of `similarity`.
    """
    if is_batched(similarity):
        conflicts = (similarity[:, None] >= tau[..., None, None]).to(similarity.dtype).tril(-1).flatten(0, 1)
        every = alive = torch.ones_like(conflicts[..., :1])
        for _ in range(NMS_ROUNDS):
            alive = torch.baddbmm(every, conflicts, alive, alpha=-1).clamp(min=0)
        return alive.view(*tau.shape, -1) > 0
    conflicts = torch.ge(similarity[0], tau[0], out=torch.empty_like(similarity[0])).tril_(-1)
    alive = torch.ones_like(conflicts[0])
    for _ in range(len(conflicts)):
        before, alive = alive, (conflicts @ alive == 0).float()
        if torch.equal(before, alive):
            break
    return alive.bool()[None, None]


def survivors_of_smallest_tau(similarity: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Survivors `(views, tokens)` at the smallest tau that leaves `counts` `(views, 1)`: 16 bisections of [-1, 1]."""
    low, alive, width = torch.full_like(similarity[:, 0, :1], -1.0), valid, 1.0
    if not is_batched(similarity):
        for _ in range(16):
            trial = survivors(similarity, low + width)[:, 0] & valid
            enough = trial.sum(1, keepdim=True) >= counts
            alive, low = torch.where(enough, trial, alive), torch.where(enough, low, low + width)
            width /= 2
        return alive
    for _ in range(8):  # two bisections at a time, the second for either outcome of the first
        trials = (
            survivors(similarity, torch.cat([low + width / 2, low + width, low + 1.5 * width], 1)) & valid[:, None]
        )
        lower, middle, upper = (trials.sum(2) >= counts).split(1, 1)
        section = torch.where(middle, torch.where(lower, 0, 1), torch.where(upper, 2, 3))
        found = trials.gather(1, section.clamp(max=2)[..., None].expand(-1, -1, valid.shape[1]))[:, 0]
        alive = torch.where(section < 3, found, alive)
        low = low + width / 2 * section
        width /= 4
    return alive


def proportional_quotas(sizes: torch.Tensor, total: int | torch.Tensor) -> torch.Tensor:
    """
    Share out `total` tokens in proportion to the groups' survivors (equation 6), by largest remainder.

    The paper rounds each share, which need not sum to N. Equal remainders go to the lower group.

    Args:
        sizes (`torch.LongTensor` of shape `(..., groups)`): survivors of each group.
        total (`int` or `torch.LongTensor` of shape `(..., 1)`): tokens to share out; of fewer survivors, all.

    Returns:
        `torch.LongTensor` of shape `(..., groups)`, none above its group's size, their sum `total`.
    """
    survivors = sizes.sum(-1, keepdim=True)
    total = survivors.clamp(max=total)
    shares = sizes * total
    quotas = shares // survivors.clamp(min=1)
    by_remainder = (shares - quotas * survivors).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(sizes.shape[-1], device=sizes.device).expand_as(sizes)
    rank = torch.empty_like(by_remainder).scatter(-1, by_remainder, place)
    return quotas + (rank < total - quotas.sum(-1, keepdim=True))
