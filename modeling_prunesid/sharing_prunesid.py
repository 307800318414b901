"""Budgets of an input that is encoded as several views: the crops of an image, the frames of a clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from .configuration_prunesid import check_budget
from .selection import redundancy, resolve_budget
from .views_prunesid import choose_tokens, listed_budgets


@dataclass
class SharedBudgets:
    """
    What several inputs may keep.

    Args:
        totals (`list[int]`): N of each input.
        rule (`"equal"`, `"information"` or `"reference"`):
            How a total becomes budgets of views: shared equally; shared in proportion to the views' information; or
            not at all: each view is given N' of its own by `reference_information`, and the total is the nominal one.
    """

    totals: list[int]
    rule: str


def request_budgets(
    settings: PretrainedConfig,
    num_visual_tokens: int | float | Sequence[int] | torch.Tensor | None,
    num_tokens: Sequence[Sequence[int]],
    full_view: int,
    extra_kept: int = 0,
) -> SharedBudgets | None:
    """
    What each input may keep; None where nothing is to be dropped.

    Args:
        settings (`PruneSIDConfig`).
        num_visual_tokens: what the caller asks for in place of `settings.budget`: a count or a share, read by
            `settings.budget_scope`, or one total for each input.
        num_tokens (`list[list[int]]`): tokens of each view of each input. Views of none are left out.
        full_view (`int`): tokens of a view without padding, of which a share of a view is taken.
        extra_kept (`int`): tokens of each view that are kept in any case.

    Raises:
        `ValueError`: for an invalid budget, another number of totals than of inputs, or a total that is too small.
    """
    settings.check()
    budgets = listed_budgets(num_visual_tokens, len(num_tokens))
    is_total = budgets is not None or settings.budget_scope == "image"
    is_by_reference = settings.dynamic and settings.budget_scope == "view" and num_visual_tokens is None
    if budgets is None:
        budgets = [settings.budget if num_visual_tokens is None else num_visual_tokens] * len(num_tokens)
    if None in budgets:
        return None
    totals = []
    for budget, views in zip(budgets, num_tokens):
        check_budget(budget, name="num_visual_tokens")
        if is_total:
            total = resolve_budget(budget, sum(views))
        else:
            total = sum(min(resolve_budget(budget, full_view), tokens) for tokens in views)
        smallest = sum(min(extra_kept + 1, tokens) for tokens in views)
        if total < smallest:
            raise ValueError(
                f"num_visual_tokens={budget!r} gives {total} tokens to an input of {len(views)} views (crops or "
                f"frames), which keep at least {smallest}: {extra_kept + 1} of each. Ask for more."
            )
        totals.append(total)
    if all(total >= sum(views) for total, views in zip(totals, num_tokens)):
        return None
    if is_by_reference:
        return SharedBudgets(totals, "reference")
    return SharedBudgets(totals, "information" if settings.dynamic and is_total else "equal")


@torch.compiler.disable
def share_total(total: int, weights: Sequence[float], num_tokens: Sequence[int], minimum: int = 1) -> list[int]:
    """
    Shares a total over views in proportion to their weights, by Webster's method: the next token goes to the view that
    is furthest behind. The shares sum to the total exactly, and none shrinks when the total grows.

    Args:
        total (`int`): at most the sum of `num_tokens`.
        weights (`list[float]`): one for each view.
        num_tokens (`list[int]`): what each view can receive at most.
        minimum (`int`): what each view receives first.

    Returns:
        `list[int]`: the share of each view.
    """
    weights = [max(weight, torch.finfo(torch.float32).eps) for weight in weights]
    shares = [min(minimum, tokens) for tokens in num_tokens]
    for _ in range(total - sum(shares)):
        not_full = [view for view, tokens in enumerate(num_tokens) if shares[view] < tokens]
        shares[max(not_full, key=lambda view: weights[view] / (shares[view] + 0.5))] += 1
    return shares


def choose_tokens_of_views(
    settings: PretrainedConfig,
    hidden_states: Sequence[torch.Tensor],
    num_tokens: Sequence[int],
    total: int,
    rule: str,
    full_view: int,
    extra_kept: int = 0,
    cls_attention: Sequence[torch.Tensor] | None = None,
    projected: Sequence[torch.Tensor] | None = None,
    information: Sequence[float] | None = None,
) -> list[torch.LongTensor]:
    """
    The kept tokens of each view of one input.

    Args:
        settings (`PruneSIDConfig`).
        hidden_states (`list[torch.Tensor]`, each of shape `(patches, dim)`): patch features of each view.
        total (`int`), rule (`str`): this input's, of [`SharedBudgets`].
        num_tokens (`list[int]`), full_view (`int`), extra_kept (`int`): this input's, as given to `request_budgets`.
        cls_attention (`list[torch.Tensor]`, each of shape `(tokens,)`, *optional*): for `score="cls_attention"`.
        projected (`list[torch.Tensor]`, each of shape `(patches, hidden_size)`, *optional*): of `project_if_compared`.
        information (`list[float]`, *optional*): what a total is shared by, by default 1 - rho of each view.

    Returns:
        `list[torch.LongTensor]`: ascending indices of the kept patches of each view; none of a view of no more than
        `extra_kept` tokens.
    """
    if rule == "reference":
        shares = [min(resolve_budget(settings.budget, full_view), tokens) for tokens in num_tokens]
    else:
        weights = [1.0] * len(num_tokens)
        if rule == "information" and information is not None:
            weights = list(information)
        elif rule == "information":
            weights = [1 - float(redundancy(view[None])) if len(view) else 0.0 for view in hidden_states]
        shares = share_total(total, weights, num_tokens, minimum=extra_kept + 1)
    kept = []
    for index, (view, share) in enumerate(zip(hidden_states, shares)):
        if num_tokens[index] <= extra_kept:
            kept.append(torch.empty(0, dtype=torch.long, device=view.device))
            continue
        kept += choose_tokens(
            settings,
            view[None],
            [share],
            is_dynamic=rule == "reference",
            extra_kept=extra_kept,
            cls_attention=None if cls_attention is None else cls_attention[index][None],
            projected=None if projected is None else projected[index][None],
        )
    return kept
