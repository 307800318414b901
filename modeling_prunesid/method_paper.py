"""PruneSID as the paper has it (section 3): PSCA groups, tokens ranked by |V|, quotas in proportion to survivors."""

from typing import Any

import torch

from .context import QUESTION_RULE, Context, Selection, in_parts, needs_of_settings
from .selection import proportional_quotas, select_by_groups


DEFAULTS = {"grouping": "psca", "seed": 0, "question": False}
RULES = {
    "grouping": (("psca", "kmeans", "random").__contains__, "one of 'psca', 'kmeans', 'random'"),
    "seed": (lambda value: type(value) is int and value >= 0, "an integer of at least 0"),
    "question": QUESTION_RULE,
}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return needs_of_settings(method_settings)


@in_parts
def select(views: torch.Tensor, counts: torch.LongTensor, settings: Any, context: Context) -> Selection:
    """
    The tokens to keep: exactly N ascending, unique indices of each view, whatever the input.

    Args:
        views (`torch.Tensor` of shape `(views, tokens, dim)`): features that tokens are compared by.
        counts (`torch.LongTensor` of shape `(views,)`): N of each view.
        settings: `num_groups`, `nms_lambda` and `method_settings`: `grouping` and its `seed` (Table 5).
        context ([`Context`]): with `relevance`, where the question is read.
    """
    options = DEFAULTS | (settings.method_settings or {})

    def share_out(sizes, held, total, nominal, tokens):
        return proportional_quotas(sizes, total)

    chosen = {name: options[name] for name in ("grouping", "seed")}
    return select_by_groups(views, counts, settings, context, "component", "tokens", share_out, **chosen)
