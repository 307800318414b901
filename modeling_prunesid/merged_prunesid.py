"""Token selection for towers of native resolution: images of any number of tokens, chosen behind the patch merger."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from .configuration_prunesid import check_budget, refuse_cls
from .select_tokens import select_tokens
from .selection import information_budgets, redundancy, resolve_budget
from .sharing_prunesid import share_total
from .views_prunesid import listed_budgets


# lambda = N/32 of section 3.3 was tuned where N is of 576 tokens; as a share of the tokens it is 18 * N/T.
_LAMBDA_OF_A_SHARE = 576 / 32


def keep_merged_tokens(
    settings: PretrainedConfig,
    output: Any,
    grid_thw: torch.LongTensor,
    merge_size: int,
    num_visual_tokens: int | float | Sequence[int] | torch.LongTensor | None,
) -> Any:
    """
    Keeps N tokens of each image and of each temporal slice of a video.

    A share of a slice stands for at least `settings.min_budget` tokens, so that small slices are left whole. K is N/4
    and lambda 18 * N/T. The authors' release for Qwen2-VL has the same K and lambda, but for two things that are not
    in the paper: lambda never falls below 1, and rho is about halved, as the mean of a matrix half of which is zeros.

    Args:
        settings (`PruneSIDConfig`).
        output (`BaseModelOutputWithPooling`): upstream's, whose `pooler_output` and each layer of whose
            `deepstack_features` are sequences of `(T, hidden_size)` for each image or video.
        grid_thw (`torch.LongTensor` of shape `(num_images, 3)`): slices, and patches down and across, of each.
        merge_size (`int`): patches down, and across, that the merger makes one token of.
        num_visual_tokens: what the caller asks for in place of `settings.budget`: a count or a share, read by
            `settings.budget_scope`, or the total of each image or video.

    Returns:
        `output` itself if nothing is to be dropped; else with the kept rows alone, ascending `keep_indices` into the T
        tokens of each image or video, and `num_placeholders`, T of each.

    Raises:
        `ValueError`: for an invalid budget, or settings that need a CLS token.
    """
    settings.check()
    refuse_cls(settings)
    grids = [(slices, height * width // merge_size**2) for slices, height, width in grid_thw.tolist()]
    listed = listed_budgets(num_visual_tokens, len(grids))
    budgets = listed or [settings.budget if num_visual_tokens is None else num_visual_tokens] * len(grids)
    if None in budgets:
        return output
    for budget in budgets:
        check_budget(budget, name="num_visual_tokens")
    is_total = listed is not None or settings.budget_scope == "image"
    resolve = _resolve_total if is_total else _resolve_share_or_count
    counts = [resolve(settings, budget, *grid) for budget, grid in zip(budgets, grids)]
    if all(count >= slices * size if is_total else count >= size for count, (slices, size) in zip(counts, grids)):
        return output

    keep_indices = []
    for features, count, (slices, size) in zip(output.pooler_output, counts, grids):
        views = features.detach().view(slices, size, -1)
        if is_total:
            weights = (1 - redundancy(views)).tolist() if settings.dynamic else [1.0] * slices
            shares = share_total(count, weights, [size] * slices)
        elif settings.dynamic and num_visual_tokens is None:
            bounds = {"minimum": settings.min_budget, "maximum": settings.max_budget}
            rho = redundancy(views)
            shares = information_budgets(rho, count, size, settings.reference_information, **bounds).tolist()
        else:
            shares = [count] * slices
        kept = [_choose_tokens(settings, view, share) for view, share in zip(views, shares)]
        keep_indices.append(torch.cat([indices + start * size for start, indices in enumerate(kept)]))

    output.pooler_output = _take_rows(output.pooler_output, keep_indices)
    if output.get("deepstack_features") is not None:
        output.deepstack_features = [_take_rows(layer, keep_indices) for layer in output.deepstack_features]
    output["keep_indices"] = keep_indices
    output["num_placeholders"] = [slices * size for slices, size in grids]
    return output


def _resolve_share_or_count(settings: PretrainedConfig, budget: int | float, slices: int, size: int) -> int:
    """N of each slice."""
    count = resolve_budget(budget, size)
    floor = settings.min_budget if isinstance(budget, float) and settings.min_budget is not None else 1
    return min(max(count, floor), size)


def _resolve_total(settings: PretrainedConfig, budget: int | float, slices: int, size: int) -> int:
    """N of a whole image or video."""
    count = resolve_budget(budget, slices * size)
    if count < slices:
        raise ValueError(
            f"num_visual_tokens={budget!r} is a total of {count} tokens for {slices} temporal slices, each of which "
            f"keeps at least one. Ask for {slices} or more."
        )
    return count


def _choose_tokens(settings: PretrainedConfig, features: torch.Tensor, count: int) -> torch.LongTensor:
    """Ascending indices of the kept ones of `(tokens, dim)` features."""
    nms_lambda = settings.nms_lambda
    if nms_lambda is None:
        nms_lambda = _LAMBDA_OF_A_SHARE * count / len(features)
    selection = select_tokens(
        features[None],
        count,
        num_groups=settings.num_groups,
        nms_lambda=nms_lambda,
        score=settings.score,
        center=settings.center,
        quota=settings.quota,
        grouping=settings.grouping,
        seed=settings.seed,
    )
    return selection.indices[0]


def _take_rows(views: Sequence[torch.Tensor], indices: Sequence[torch.LongTensor]) -> list[torch.Tensor]:
    return [view[kept.to(view.device)] for view, kept in zip(views, indices)]
