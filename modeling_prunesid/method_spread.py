"""Ours: tokens by their score and by their distance to those already kept, without groups and NMS."""

import math
from typing import Any

import torch

from .context import QUESTION_RULE, Context, Selection, in_parts, largest, needs_of_settings
from .exact import is_batched
from .selection import SCORES, groups_of, kept_tokens, strongest_components
from .similarity import compare, distances


INDISTINCT = 16 * torch.finfo(torch.float32).eps  # cosine distance of equal tokens, at most, with its rounding error


DEFAULTS = {"score": "cls_attention", "center": "tokens", "keep_cls": False, "question": False}
RULES = {
    "score": (SCORES.__contains__, "one of " + ", ".join(map(repr, SCORES))),
    "center": (("tokens", "features").__contains__, "one of 'tokens', 'features'"),
    "keep_cls": (lambda value: isinstance(value, bool), "True or False"),
    "question": QUESTION_RULE,
}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    own = frozenset({"projected", (DEFAULTS | method_settings)["score"]} - {"component"})
    return own | needs_of_settings(method_settings)


@in_parts
def select(views: torch.Tensor, counts: torch.LongTensor, settings: Any, context: Context) -> Selection:
    """
    The tokens to keep: exactly N ascending, unique indices of each view, whatever the input.

    Args:
        views (`torch.Tensor` of shape `(views, tokens, dim)`): features that tokens are compared by.
        counts (`torch.LongTensor` of shape `(views,)`): N of each view.
        settings: `method_settings`: `score`, and `center` of `score="component"`, for which `num_groups` is read.
        context ([`Context`]): with `attention`, and with `projected`, between which distances are measured;
            without them they are between `views`. With `relevance`, where the question is read.
    """
    options = DEFAULTS | (settings.method_settings or {})
    tokens, most = views.shape[1], largest(context)
    if most == tokens and not is_batched(views) and not context.details:
        return Selection(torch.arange(tokens)[None], counts, compare(views, None, context).rho)
    attention = None if options["score"] == "component" else context.attention.float()
    pairs = compare(views, attention, context)
    groups = None
    if attention is None:
        num_groups, own = groups_of(counts, pairs.lengths, settings, context, tokens)
        attention, groups = strongest_components(pairs, num_groups, own, options["center"])
        groups = groups.masked_fill(~pairs.finite, -1)
    scores = attention.masked_fill(~pairs.finite, -math.inf)
    apart = distances(views if context.projected is None else context.projected, INDISTINCT)
    chosen = spread_tokens(apart, scores, most, context.relevance)
    among_n = torch.arange(most, device=views.device) < counts[:, None]
    kept = torch.zeros_like(pairs.finite).scatter(1, chosen, among_n)
    return kept_tokens(kept, counts, context, pairs.rho, groups if context.details else None, scores)


def spread_tokens(
    distances: torch.Tensor, scores: torch.Tensor, count: int, relevance: torch.Tensor | None = None
) -> torch.LongTensor:
    """
    The token of highest score, then one after another that of largest score ** 0.25 * distance, where both are times
    the square of the token's relevance if that is given.

    The distance is the cosine distance to the nearest kept token. With equal scores this is the greedy answer to the
    max-min diversity problem. Tokens that rounding cannot tell from a kept one are `INDISTINCT` away from it, so that
    they follow by score. Ties go to the lower token.

    Args:
        distances (`torch.FloatTensor` of shape `(views, tokens, tokens)`): at least `INDISTINCT`.
        scores (`torch.FloatTensor` of shape `(views, tokens)`): negative ones count as 0; tokens at -inf come last.
        count (`int`): tokens to choose, at most `tokens`.
        relevance (`torch.FloatTensor` of shape `(views, tokens)`, *optional*): see [`Context`].

    Returns:
        `torch.LongTensor` of shape `(views, count)`, in the order of the choice.
    """
    tokens = scores.shape[1]
    weights = scores.clamp(min=0).sqrt().sqrt()
    weights = weights if relevance is None else weights * relevance.square()
    # What a chosen token leaves to each other one; -2 for itself, so that a token is chosen once.
    gains = distances * weights[:, None]
    gains.diagonal(dim1=1, dim2=2).fill_(-2)
    best, chosen = torch.where(scores > -math.inf, 2 * weights, -1), []
    for _ in range(count):
        token = best.argmax(1, keepdim=True)
        chosen.append(token)
        best = best.minimum(gains.gather(1, token[..., None].expand(-1, -1, tokens))[:, 0])
    return torch.cat(chosen, 1)
