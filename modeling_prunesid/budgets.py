"""From a configuration to the kept tokens of each view (image, tile, crop or frame): budgets, and who gets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from .configuration_prunesid import check_budget
from .selection_prunesid import information_budgets, redundancy, resolve_budget, select_tokens


class View(NamedTuple):
    """
    One view of an input.

    Args:
        rows (`torch.LongTensor` of shape `(tokens,)`): its tokens among upstream's features of the input, ascending.
        patches (`torch.LongTensor` of shape `(tokens,)`, *optional*):
            The same tokens among the patches of the view in the vision tower, where tokens are compared there.
        cls_at (`int`, *optional*): the row before which its CLS token goes, if that is kept; by default its first.
    """

    rows: torch.LongTensor
    patches: torch.LongTensor | None = None
    cls_at: int | None = None


@dataclass
class Budgets:
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


def listed_budgets(
    num_visual_tokens: int | float | Sequence[int] | torch.Tensor | None, num_inputs: int
) -> list | None:
    """
    The totals where a caller passes one for each input (image or clip); None where he passes a single value, or none.

    Raises:
        `ValueError`: for another number of totals than of inputs.
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


def request_budgets(
    settings: PretrainedConfig,
    num_visual_tokens: int | float | Sequence[int] | torch.Tensor | None,
    num_tokens: Sequence[Sequence[int]],
    full_view: int | None = None,
    extra_kept: int = 0,
) -> Budgets | None:
    """
    What each input may keep; None where nothing is to be dropped.

    Args:
        settings (`PruneSIDConfig`).
        num_visual_tokens: what the caller asks for in place of `settings.budget`: a count or a share, read by
            `settings.budget_scope`, or one total for each input.
        num_tokens (`list[list[int]]`): tokens of each view of each input. Views of none are left out.
        full_view (`int`, *optional*):
            Tokens of a view without padding, of which a share of a view is taken; by default the view's own tokens.
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
            total = sum(nominal_budgets(settings, budget, views, full_view))
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
        return Budgets(totals, "reference")
    return Budgets(totals, "information" if settings.dynamic and is_total else "equal")


def nominal_budgets(
    settings: PretrainedConfig, budget: int | float, num_tokens: Sequence[int], full_view: int | None = None
) -> list[int]:
    """N of each view of `num_tokens`. A share stands for no fewer tokens than `settings.min_budget`."""
    counts = [resolve_budget(budget, tokens if full_view is None else full_view) for tokens in num_tokens]
    if isinstance(budget, float) and settings.min_budget is not None:
        counts = [max(count, settings.min_budget) for count in counts]
    return [min(count, tokens) for count, tokens in zip(counts, num_tokens)]


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


def frame_information(frames: Sequence[torch.Tensor]) -> list[float]:
    """
    What each frame of a clip shows: its information score 1 - rho (section 3.4), but no more than its change, the mean
    cosine distance of its patches to the same patches of the frame before. This is ours: a static frame has none.

    Args:
        frames (`list[torch.Tensor]`, each of shape `(patches, dim)`).
    """
    frames = torch.stack(list(frames))
    scores = 1 - redundancy(frames)
    directions = torch.nn.functional.normalize(frames.float(), dim=-1)
    change = 1 - (directions[1:] * directions[:-1]).sum(-1).mean(-1)
    return [float(scores[0]), *torch.minimum(scores[1:], change.nan_to_num(0)).tolist()]


def view_information(views: Sequence[torch.Tensor]) -> list[float]:
    """The information score 1 - rho of each view (section 3.4), from features `(tokens, dim)`; 0 of an empty one."""
    return [1 - float(redundancy(view[None])) if len(view) else 0.0 for view in views]


def choose_tokens(
    settings: PretrainedConfig,
    views: Sequence[torch.Tensor],
    num_tokens: Sequence[int],
    total: int,
    rule: str,
    *,
    full_view: int | None = None,
    extra_kept: int = 0,
    lambda_of_a_share: float | None = None,
    cls_attention: Sequence[torch.Tensor] | None = None,
    projected: Sequence[torch.Tensor] | None = None,
    information=view_information,
) -> list[torch.LongTensor]:
    """
    The kept tokens of each view of one input.

    Args:
        settings (`PruneSIDConfig`).
        views (`list[torch.Tensor]`, each of shape `(tokens, dim)`): the features that are compared, of each view.
        num_tokens (`list[int]`), full_view (`int`), extra_kept (`int`): this input's, as given to `request_budgets`.
        total (`int`), rule (`str`): this input's, of [`Budgets`].
        lambda_of_a_share (`float`, *optional*):
            lambda is this factor times N/T where `settings` have none, in place of N/32.
        cls_attention (`list[torch.Tensor]`, each of shape `(tokens,)`, *optional*): for `score="cls_attention"`.
        projected (`list[torch.Tensor]`, each of shape `(tokens, hidden_size)`, *optional*):
            The tokens as the language model would get them, where the method compares these.
        information (`Callable`): from `views` to the scores that a total is shared by with rule `"information"`.

    Returns:
        `list[torch.LongTensor]`: ascending indices of the kept tokens of each view; none of a view of no more than
        `extra_kept` tokens.
    """
    settings.check()
    if rule == "reference":
        shares = nominal_budgets(settings, settings.budget, num_tokens, full_view)
    else:
        weights = information(views) if rule == "information" else [1.0] * len(num_tokens)
        shares = share_total(total, weights, num_tokens, minimum=extra_kept + 1)
    kept = []
    for index, (view, share) in enumerate(zip(views, shares)):
        if num_tokens[index] <= extra_kept:
            kept.append(torch.empty(0, dtype=torch.long, device=view.device))
            continue
        if rule == "reference":
            share = _adjusted_budget(settings, view, share, len(view) + extra_kept)
        count = min(share - extra_kept, len(view))
        if count < 1:
            raise ValueError(
                f"prunesid_config.budget must exceed the {extra_kept} tokens that are kept besides the patches, got "
                f"{share}. Raise it{', or min_budget,' if rule == 'reference' else ''} to at least {extra_kept + 1}."
            )
        nms_lambda = settings.nms_lambda
        if nms_lambda is None and lambda_of_a_share is not None:
            nms_lambda = lambda_of_a_share * count / len(view)
        selection = select_tokens(
            view[None],
            count,
            cls_attention=None if cls_attention is None else cls_attention[index][None],
            projected=None if projected is None else projected[index][None],
            num_groups=settings.num_groups,
            nms_lambda=nms_lambda,
            score=settings.score,
            center=settings.center,
            quota=settings.quota,
            grouping=settings.grouping,
            seed=settings.seed,
            extra_kept=extra_kept,
        )
        kept.append(selection.indices[0])
    return kept


def _adjusted_budget(settings: PretrainedConfig, view: torch.Tensor, budget: int, num_tokens: int) -> int:
    """N' of a view by its information (section 3.4)."""
    bounds = {"minimum": settings.min_budget, "maximum": settings.max_budget}
    adjusted = information_budgets(
        redundancy(view[None]), budget, num_tokens, settings.reference_information, **bounds
    )
    return int(adjusted)
