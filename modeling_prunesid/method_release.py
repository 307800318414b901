"""PruneSID as its authors' release has it: attention of CLS as the score, other means, bounded quotas, CLS kept."""

from typing import Any

import torch

from .context import Context, Selection, in_parts
from .selection import SCORES, proportional_quotas, select_by_groups


DEFAULTS = {
    "score": "cls_attention",
    "center": "features",
    "quota": "bounded",
    "keep_cls": True,
    "grouping": "psca",
    "seed": 0,
}
RULES = {
    "score": (SCORES.__contains__, "one of " + ", ".join(map(repr, SCORES))),
    "center": (("tokens", "features").__contains__, "one of 'tokens', 'features'"),
    "quota": (("proportional", "bounded").__contains__, "one of 'proportional', 'bounded'"),
    "keep_cls": (lambda value: isinstance(value, bool), "True or False"),
    "grouping": (("psca", "kmeans", "random").__contains__, "one of 'psca', 'kmeans', 'random'"),
    "seed": (lambda value: type(value) is int and value >= 0, "an integer of at least 0"),
}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({(DEFAULTS | method_settings)["score"]} - {"component"})


@in_parts
def select(views: torch.Tensor, counts: torch.LongTensor, settings: Any, context: Context) -> Selection:
    """
    The tokens to keep: exactly N ascending, unique indices of each view, whatever the input.

    Args:
        views (`torch.Tensor` of shape `(views, tokens, dim)`): features that tokens are compared by.
        counts (`torch.LongTensor` of shape `(views,)`): N of each view, without CLS.
        settings: `num_groups`, `nms_lambda` and `method_settings`: see `DEFAULTS`. `keep_cls` is for the caller.
        context ([`Context`]): with `attention`, if that is the score.
    """
    options = DEFAULTS | (settings.method_settings or {})

    def share_out(sizes, total, nominal, tokens):
        if options["quota"] == "proportional":
            return proportional_quotas(sizes, total)
        return bounded_quotas(sizes, total, nominal, tokens)

    names = ("score", "center", "grouping", "seed")
    chosen = {name: options[name] for name in names}
    return select_by_groups(views, counts, settings, context, share_out=share_out, **chosen)


def bounded_quotas(
    sizes: torch.Tensor, total: int | torch.Tensor, nominal: int | torch.Tensor, tokens: int
) -> torch.Tensor:
    """
    Share out `total` tokens between bounds, as the authors' release does.

    Each group with survivors gets one token; the others follow by cumulative rounding of the survivors' shares, up to
    5 * ceil(N / 64) a group, a bound raised by the least that lets the groups hold `total`; what it cuts off goes to
    the groups with most survivors. Two rules are ours: no group takes a suppressed token before another's survivor,
    and no group is sure of a token where the groups outnumber `total`.

    Args:
        sizes (`torch.LongTensor` of shape `(..., groups)`): survivors of each group.
        total (`int` or `torch.LongTensor` of shape `(..., 1)`): tokens to share out, at most all survivors.
        nominal (`int` or `torch.LongTensor` of shape `(..., 1)`): N of the bound.
        tokens (`int`): tokens of the image, at least the size of any group.

    Returns:
        `torch.LongTensor` of shape `(..., groups)`, none above its group's size, their sum `total`.
    """
    held_by_bound = sizes[..., None, :].minimum(torch.arange(tokens + 1, device=sizes.device)[:, None]).sum(-1)
    bound = (held_by_bound < total).sum(-1, keepdim=True).maximum(torch.as_tensor(5 * ((nominal + 63) // 64)))
    upper = sizes.minimum(bound)
    lower = sizes.clamp(max=1)
    lower = lower * (lower.sum(-1, keepdim=True) <= total)

    cumulative = sizes.cumsum(-1)
    survivors = cumulative[..., -1:]
    goals = (2 * (total - lower.sum(-1, keepdim=True)) * cumulative + survivors) // (2 * survivors).clamp(min=1)
    quotas = (lower + goals.diff(dim=-1, prepend=torch.zeros_like(survivors))).minimum(upper)
    largest_first = sizes.argsort(dim=-1, descending=True, stable=True)
    room = (upper - quotas).gather(-1, largest_first)
    added = (total - quotas.sum(-1, keepdim=True) - (room.cumsum(-1) - room)).clamp(min=0).minimum(room)
    return quotas.scatter_add(-1, largest_first, added)
