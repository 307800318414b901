"""PruneSID as its authors' release has it: attention of CLS as the score, other means, bounded quotas, CLS kept.

What differs: it hands tokens over group by group, ours ascending; it suppresses above tau, the paper and ours from
tau on; and ties are decided by chance there.
"""

from typing import Any

import torch

from .context import QUESTION_RULE, Context, Selection, in_parts, needs_of_settings
from .selection import SCORES, proportional_quotas, select_by_groups


DEFAULTS = {
    "score": "cls_attention",
    "center": "features",
    "quota": "bounded",
    "keep_cls": True,
    "grouping": "psca",
    "seed": 0,
    "question": False,
}
RULES = {
    "score": (SCORES.__contains__, "one of " + ", ".join(map(repr, SCORES))),
    "center": (("tokens", "features").__contains__, "one of 'tokens', 'features'"),
    "quota": (("proportional", "bounded").__contains__, "one of 'proportional', 'bounded'"),
    "keep_cls": (lambda value: isinstance(value, bool), "True or False"),
    "grouping": (("psca", "kmeans", "random").__contains__, "one of 'psca', 'kmeans', 'random'"),
    "seed": (lambda value: type(value) is int and value >= 0, "an integer of at least 0"),
    "question": QUESTION_RULE,
}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({(DEFAULTS | method_settings)["score"]} - {"component"}) | needs_of_settings(method_settings)


@in_parts
def select(views: torch.Tensor, counts: torch.LongTensor, settings: Any, context: Context) -> Selection:
    """
    The tokens to keep: exactly N ascending, unique indices of each view, whatever the input.

    Args:
        views (`torch.Tensor` of shape `(views, tokens, dim)`): features that tokens are compared by.
        counts (`torch.LongTensor` of shape `(views,)`): N of each view, without CLS.
        settings: `num_groups`, `nms_lambda` and `method_settings`: see `DEFAULTS`. `keep_cls` is for the caller.
        context ([`Context`]): with `attention`, if that is the score; with `relevance`, where the question is read.
    """
    options = DEFAULTS | (settings.method_settings or {})

    def share_out(sizes, held, total, nominal, tokens):
        if options["quota"] == "proportional":
            return proportional_quotas(sizes, total)
        return bounded_quotas(sizes, held, total, nominal, tokens)

    names = ("score", "center", "grouping", "seed")
    chosen = {name: options[name] for name in names}
    return select_by_groups(views, counts, settings, context, share_out=share_out, **chosen)


def bounded_quotas(
    survivors: torch.Tensor,
    held: torch.Tensor,
    total: int | torch.Tensor,
    nominal: int | torch.Tensor,
    tokens: int,
) -> torch.Tensor:
    """
    Share out `total` tokens between bounds, as the authors' release does.

    Each group gets one token; the others follow by cumulative rounding of the survivors' shares, halves to the even
    number, up to 5 * ceil(N / 64) or the group's survivors. Where the groups cannot hold N so, every bound rises by
    one token at a time up to the group's own tokens: a group then contributes suppressed tokens before another has
    handed over all of its survivors. What the bounds cut off goes to the groups with most survivors. One rule is ours:
    where the groups outnumber `total`, none is sure of a token (the release returns more than N, or drops groups).

    Args:
        survivors (`torch.LongTensor` of shape `(..., groups)`): survivors of each group.
        held (`torch.LongTensor` of shape `(..., groups)`): tokens of each group, suppressed ones as well.
        total (`int` or `torch.LongTensor` of shape `(..., 1)`):
            Tokens to share out: N, less a kept CLS token; of fewer tokens, all.
        nominal (`int` or `torch.LongTensor` of shape `(..., 1)`): N of the bounds, with CLS.
        tokens (`int`): tokens of the image, at least the size of any group.

    Returns:
        `torch.LongTensor` of shape `(..., groups)`, none above its group's tokens, their sum `total`.
    """
    everything = held.sum(-1, keepdim=True)
    total, wanted = everything.clamp(max=total), everything.clamp(max=nominal)
    base = survivors.minimum(torch.as_tensor(5 * ((nominal + 63) // 64), device=survivors.device))
    raises = torch.arange(tokens, device=survivors.device)[:, None]
    capacity = (base[..., None, :] + raises).minimum(held[..., None, :]).sum(-1)
    upper = (base + (capacity < wanted).sum(-1, keepdim=True)).minimum(held)
    lower = held.clamp(max=1)
    lower = lower * (lower.sum(-1, keepdim=True) <= total)

    cumulative = survivors.cumsum(-1)
    shared = (total - lower.sum(-1, keepdim=True)) * cumulative
    divisor = cumulative[..., -1:].clamp(min=1)
    whole, rest = shared // divisor, shared % divisor
    goals = whole + (2 * rest + whole % 2 > divisor)
    quotas = (lower + goals.diff(dim=-1, prepend=torch.zeros_like(divisor))).minimum(upper)
    most_first = survivors.argsort(dim=-1, descending=True, stable=True)
    room = (upper - quotas).gather(-1, most_first)
    added = (total - quotas.sum(-1, keepdim=True) - (room.cumsum(-1) - room)).clamp(min=0).minimum(room)
    return quotas.scatter_add(-1, most_first, added)
