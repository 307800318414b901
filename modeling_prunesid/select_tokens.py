"""`select_tokens`: a selection on tensors alone, without a model. Checks its arguments and calls a method."""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch

from .checks import check_integer, resolve_budget
from .context import Context, Selection, counts_on
from .methods import method_of
from .retired import method_of_saved


CHOICES = {
    "score": ("component", "cls_attention"),
    "center": ("tokens", "features"),
    "quota": ("proportional", "bounded", "spread"),
    "grouping": ("psca", "kmeans", "random"),
}


class _Settings(NamedTuple):
    """What a method reads of a `PruneSIDConfig`; `torch.compile` can make it."""

    num_groups: int | None
    nms_lambda: float | str | None
    method_settings: dict[str, Any]


@torch.no_grad()
def select_tokens(
    hidden_states: torch.Tensor,
    budget: int | float | torch.LongTensor,
    *,
    cls_attention: torch.Tensor | None = None,
    projected: torch.Tensor | None = None,
    num_groups: int | None = None,
    nms_lambda: float | str | None = None,
    score: str = "component",
    center: str = "tokens",
    quota: str = "proportional",
    grouping: str = "psca",
    seed: int = 0,
    extra_kept: int = 0,
    return_details: bool = False,
) -> Selection:
    """
    Choose the tokens to keep: exactly N sorted, unique indices an image, whatever the input.

    The defaults are the paper as written; `score="cls_attention"`, `center="features"` and `quota="bounded"` are the
    choices of its authors' release. Ties go to the lower token and the lower component. If NMS leaves fewer than N
    tokens, the suppressed tokens of highest score fill up. A token with a non-finite feature (or attention) takes no
    part in means, similarities or groups: it ranks behind all others.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, dim)`): token features X, any floating dtype.
        budget (`int`, `float` or `torch.LongTensor` of shape `(batch,)`):
            N: a count of at least 1, a share in (0, 1] of the tokens (rounded half up, at least one token), or a count
            for each image. From `tokens` on, nothing is dropped.
        cls_attention (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
            Attention of the CLS token, summed over heads; the score of `score="cls_attention"`.
        projected (`torch.Tensor` of shape `(batch, tokens, any dim)`, *optional*):
            The tokens as the language model would get them, between which `quota="spread"` measures distances; without
            them it does between `hidden_states`.
        num_groups (`int`, *optional*):
            K, the number of components, N/4 by default. Components beyond the rank of the features stay empty.
        nms_lambda (`float` or `str`, *optional*):
            lambda in tau = lambda * rho, N/32 by default. `"auto"`, which is ours and not the paper's, takes the
            smallest tau of each image that leaves N survivors, by 16 bisections of [-1, 1].
        score (`str`):
            `"component"`: |V| of the token in its own group's component (in its strongest one where the groups are not
            PSCA's); or `"cls_attention"`.
        center (`str`): subtract the mean over `"tokens"` (equation 1) or over each token's own `"features"`.
        quota (`str`):
            `proportional_quotas`, `bounded_quotas`, or `"spread"`, which is ours: `spread_tokens` of the
            whole image, without groups and NMS.
        grouping (`str`): `"psca"` or, to compare (Table 5), `kmeans_groups` or `random_groups`.
        seed (`int`): seed of `grouping="kmeans"` and `"random"`.
        extra_kept (`int`):
            Tokens that the caller keeps besides these. They count in the N of K, lambda and the bounds: the release
            counts CLS in N, which is a budget of N - 1 and one extra.
        return_details (`bool`): also return groups and scores.

    Raises:
        ValueError: an argument is none of the above; the message names it, its value and how to fix it.
    """
    _check_hidden_states(hidden_states)
    for name, value in {"score": score, "center": center, "quota": quota, "grouping": grouping}.items():
        if value not in CHOICES[name]:
            raise ValueError(f"`{name}` must be one of {CHOICES[name]}, got {value!r}.")
    if num_groups is not None:
        check_integer("num_groups", num_groups, minimum=1)
    check_integer("extra_kept", extra_kept, minimum=0)
    check_integer("seed", seed, minimum=0)
    _check_lambda(nms_lambda)
    if score == "cls_attention":
        _check_cls_attention(cls_attention, hidden_states)
    else:
        cls_attention = None
    if projected is not None:
        _check_projected(projected, hidden_states)

    tokens = hidden_states.shape[1]
    counts = _budget_of_each_image(budget, len(hidden_states), tokens)
    options = {"score": score, "center": center, "quota": quota, "grouping": grouping, "seed": seed}
    method, method_settings = method_of_saved(options)
    settings = _Settings(num_groups=num_groups, nms_lambda=nms_lambda, method_settings=method_settings)
    context = Context(
        counts=counts,
        extra_kept=extra_kept,
        attention=cls_attention,
        projected=projected,
        details=return_details,
    )
    return method_of(method)(hidden_states, counts_on(hidden_states.device, counts), settings, context)


def _budget_of_each_image(budget: int | float | torch.Tensor, batch: int, tokens: int) -> list[int]:
    if not isinstance(budget, torch.Tensor):
        return [resolve_budget(budget, tokens)] * batch
    if budget.is_floating_point() or budget.is_complex() or budget.dtype == torch.bool or budget.shape != (batch,):
        raise ValueError(
            f"`budget` as a tensor must hold one integer for each of the {batch} images, "
            f"got shape {tuple(budget.shape)} and {budget.dtype}."
        )
    return [resolve_budget(count, tokens) for count in budget.tolist()]


def _check_hidden_states(hidden_states: torch.Tensor) -> None:
    if hidden_states.dim() != 3 or 0 in hidden_states.shape or not hidden_states.is_floating_point():
        raise ValueError(
            "`hidden_states` must be a floating tensor of shape (batch, tokens, dim), none of them 0, "
            f"got shape {tuple(hidden_states.shape)} and {hidden_states.dtype}."
        )


def _check_cls_attention(cls_attention: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
    if cls_attention is None:
        raise ValueError('`score="cls_attention"` needs `cls_attention` of shape (batch, tokens), got None.')
    if cls_attention.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`cls_attention` must have shape (batch, tokens) = {tuple(hidden_states.shape[:2])}, "
            f"got {tuple(cls_attention.shape)}."
        )


def _check_projected(projected: torch.Tensor, hidden_states: torch.Tensor) -> None:
    shape = tuple(hidden_states.shape[:2])
    if projected.dim() != 3 or tuple(projected.shape[:2]) != shape or not projected.is_floating_point():
        raise ValueError(
            f"`projected` must be a floating tensor of shape (batch, tokens, dim) = {(*shape, 'dim')}, "
            f"got shape {tuple(projected.shape)} and {projected.dtype}."
        )


def _check_lambda(nms_lambda: float | str | None) -> None:
    number = isinstance(nms_lambda, Real) and not isinstance(nms_lambda, bool) and math.isfinite(nms_lambda)
    if not (nms_lambda is None or nms_lambda == "auto" or number):
        raise ValueError(f'`nms_lambda` must be a finite number, None (N / 32) or "auto", got {nms_lambda!r}.')
