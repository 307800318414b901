"""From a configuration to the kept tokens of each encoded view (image, crop or frame): the part all towers share."""

from collections.abc import Callable, Sequence

import torch
from transformers import PretrainedConfig

from .configuration_prunesid import check_budget
from .select_tokens import select_tokens
from .selection import information_budgets, redundancy, resolve_budget


def listed_budgets(
    num_visual_tokens: int | float | Sequence[int] | torch.Tensor | None, num_inputs: int
) -> list | None:
    """
    The counts where a caller passes one for each image or clip; None where he passes a single value, or nothing.

    Raises:
        `ValueError`: for another number of counts than of inputs.
    """
    if isinstance(num_visual_tokens, torch.Tensor):
        num_visual_tokens = num_visual_tokens.tolist()
    if not isinstance(num_visual_tokens, Sequence) or isinstance(num_visual_tokens, str):
        return None
    budgets = list(num_visual_tokens)
    if len(budgets) != num_inputs:
        raise ValueError(
            f"num_visual_tokens must have one count for each of the {num_inputs} encoded inputs, got {len(budgets)}: "
            f"{budgets}. Pass a single count for all of them, or one for each."
        )
    return budgets


def requested_budgets(
    settings: PretrainedConfig,
    num_visual_tokens: int | float | Sequence[int] | torch.Tensor | None,
    num_views: int,
    num_tokens: int,
) -> list[int] | None:
    """
    The budget N of each view, before any dynamic adjustment; None where nothing is to be dropped.

    Args:
        settings (`PruneSIDConfig`).
        num_visual_tokens: what the caller asks for in place of `settings.budget`: a count or a share for every view,
            or one count for each of them.
        num_views (`int`), num_tokens (`int`): T of each view.

    Raises:
        `ValueError`: for an invalid budget, or another number of counts than of views.
    """
    budgets = listed_budgets(num_visual_tokens, num_views)
    if budgets is None:
        budgets = [settings.budget if num_visual_tokens is None else num_visual_tokens] * num_views
    if None in budgets:
        return None
    for budget in budgets:
        check_budget(budget, name="num_visual_tokens")
    budgets = [resolve_budget(budget, num_tokens) for budget in budgets]
    return None if all(budget >= num_tokens for budget in budgets) else budgets


@torch.no_grad()
def project_if_compared(
    settings: PretrainedConfig, projector: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor
) -> torch.Tensor | None:
    """
    All patches `(views, tokens, dim)` as the language model would get them, where `settings.quota` compares these. One
    view at a time, because matrix products round differently in other batch sizes.
    """
    if settings.quota != "spread":
        return None
    return torch.cat([projector(view) for view in features.split(1)])


def choose_tokens(
    settings: PretrainedConfig,
    hidden_states: torch.Tensor,
    budgets: list[int],
    is_dynamic: bool,
    extra_kept: int = 0,
    cls_attention: torch.Tensor | None = None,
    projected: torch.Tensor | None = None,
) -> list[torch.LongTensor]:
    """
    The kept tokens of each view.

    Args:
        settings (`PruneSIDConfig`).
        hidden_states (`torch.Tensor` of shape `(views, tokens, dim)`): the patch features that selection compares.
        budgets (`list[int]`): N of each view.
        is_dynamic (`bool`): adjust N to each view's information (section 3.4).
        extra_kept (`int`): how many of the N are CLS or register tokens, which are kept in any case.
        cls_attention (`torch.Tensor` of shape `(views, tokens)`, *optional*): for `score="cls_attention"`.
        projected (`torch.Tensor` of shape `(views, tokens, hidden_size)`, *optional*): of [`project_if_compared`].

    Returns:
        `list[torch.LongTensor]`: ascending indices of the kept patches of each view.
    """
    settings.check()
    num_tokens = hidden_states.shape[1]
    if is_dynamic and settings.budget_scope == "view":
        rho = redundancy(hidden_states)
        adjusted = information_budgets(
            rho,
            budgets[0],
            num_tokens + extra_kept,
            settings.reference_information,
            minimum=settings.min_budget,
            maximum=settings.max_budget,
        )
        budgets = adjusted.tolist()
    counts = [min(budget - extra_kept, num_tokens) for budget in budgets]
    if min(counts) < 1:
        raise ValueError(
            f"prunesid_config.budget must exceed the {extra_kept} tokens that are kept besides the patches, got "
            f"{min(budgets)}. Raise it{', or min_budget,' if is_dynamic else ''} to at least {extra_kept + 1}."
        )
    selection = select_tokens(
        hidden_states,
        counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device=hidden_states.device),
        cls_attention=cls_attention,
        projected=projected,
        num_groups=settings.num_groups,
        nms_lambda=settings.nms_lambda,
        score=settings.score,
        center=settings.center,
        quota=settings.quota,
        grouping=settings.grouping,
        seed=settings.seed,
        extra_kept=extra_kept,
    )
    return [indices[:count] for indices, count in zip(selection.indices, counts)]
