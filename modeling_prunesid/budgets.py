"""From a configuration to the kept tokens of each view (image, tile, crop or frame): budgets, and who gets them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from .checks import resolve_budget, warn_once
from .configuration_prunesid import check_budget
from .context import ASKED, SELECTIONS, Context, counts_on
from .methods import method_of, reads_question
from .parts import DYNAMIC


@dataclass
class Budgets:
    """
    What several inputs may keep.

    Args:
        totals (`list[int]`): N of each input.
        rule (`"equal"`, `"information"` or `"reference"`):
            How a total becomes budgets of views: shared equally; shared in proportion to the views' information; or
            not at all: each view is given N' of its own by `reference_information`, and the total is the nominal one.
        num_tokens, full_view, extra_kept: as given to `request_budgets`.
    """

    totals: list[int]
    rule: str
    num_tokens: Sequence[Sequence[int]]
    full_view: int | None = None
    extra_kept: int = 0

    @property
    def is_whole(self) -> list[bool]:
        """Which inputs keep all of their tokens, and with them those of no view."""
        return [self.rule != "reference" and n >= sum(views) for n, views in zip(self.totals, self.num_tokens)]

    def counts_of(self, sizes: list[int]) -> tuple[list[int], list[int]] | None:
        """T of each input, those of no view included, and N; None where the features decide."""
        if self.rule == "reference":
            return None
        return sizes, [size if whole else n for size, n, whole in zip(sizes, self.totals, self.is_whole)]


class Merged(NamedTuple):
    """
    Features in place of those of kept tokens, of methods that merge the dropped ones into them.

    Args:
        views (`list[int]`), counts (`list[int]`): which views have them, and N of each.
        indices (`torch.LongTensor` of shape `(views, largest N)`): the tokens that they stand for.
        features (`torch.Tensor` of shape `(views, largest N, dim)`).
    """

    views: list[int]
    counts: list[int]
    indices: torch.LongTensor
    features: torch.Tensor


class Chosen(NamedTuple):
    """
    What was chosen of the tokens of several views.

    Args:
        indices (`torch.LongTensor` of shape `(views, largest N)`): ascending, padded with the number of tokens.
        counts (`list[int]`): N of each view.
        merged ([`Merged`], *optional*).
    """

    indices: torch.LongTensor
    counts: list[int]
    merged: Merged | None = None


def listed_budgets(
    num_visual_tokens: int | float | Sequence[int] | torch.Tensor | None, num_inputs: int
) -> list[Any] | None:
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
    if isinstance(num_visual_tokens, torch.Tensor) and torch.compiler.is_compiling():
        return _traced_budgets(settings, num_visual_tokens, num_tokens, full_view, extra_kept)
    listed, is_of_image = listed_budgets(num_visual_tokens, len(num_tokens)), settings.budget_scope == "image"
    is_total, asked = is_of_image or listed is not None, num_visual_tokens
    budgets = [settings.budget if asked is None else asked] * len(num_tokens) if listed is None else listed
    if None in budgets:
        return None
    totals = []
    for budget, views in zip(budgets, num_tokens):
        check_budget(budget, name="num_visual_tokens")
        total = _total(settings, budget, views, full_view, is_total)
        smallest = sum(min(extra_kept + 1, tokens) for tokens in views)
        if total < smallest:
            raise ValueError(
                f"num_visual_tokens={budget!r} gives {total} tokens to an input of {len(views)} views (crops or "
                f"frames), which keep at least {smallest}: {extra_kept + 1} of each. Ask for more."
            )
        totals.append(total)
    if listed is not None and (is_of_image or not settings.dynamic):
        own = [_total(settings, settings.budget, views, full_view, is_of_image) for views in num_tokens]
        _say_what_is_replaced(settings.budget, own, totals)
    if all(total >= sum(views) for total, views in zip(totals, num_tokens)):
        _warn_of_excess(budgets, [sum(views) if is_total else max(views, default=0) for views in num_tokens])
        return None
    rule = "equal"
    if settings.dynamic and (is_total or asked is None):
        rule = "information" if is_total else "reference"
    return Budgets(totals, rule, num_tokens, full_view, extra_kept)


def _traced_budgets(
    settings: PretrainedConfig, num_visual_tokens: torch.Tensor, num_tokens: Sequence[Sequence[int]], *further: Any
) -> Budgets | None:
    """The model's own budgets, which a graph is traced for; it checks that those of its input are the same."""
    budgets = request_budgets(settings, None, num_tokens, *further)
    totals = [sum(views) for views in num_tokens] if budgets is None else budgets.totals
    problem = (
        f"num_visual_tokens must be {totals} for what was traced by torch.compile or torch.export: a graph has the "
        f"budget of the model, prunesid_config.budget={settings.budget}. Set that to the processor's, and trace again."
    )
    if num_visual_tokens.shape != (len(totals),):
        raise ValueError(problem)
    expected = torch.tensor(totals, device=num_visual_tokens.device)
    torch._assert_async((num_visual_tokens == expected).all(), problem)
    return budgets


def _warn_of_excess(budgets: list[Any], num_tokens: list[int]) -> None:
    """Say once that a count above all tokens, of which it leaves all, may be a slip."""
    for budget, tokens in zip(budgets, num_tokens):
        if not isinstance(budget, float) and budget > tokens > 0:
            warn_once(
                "budget above tokens",
                f"A budget of {budget} visual tokens is above the {tokens} that there are: all of them are kept.",
            )


def _say_what_is_replaced(budget: int | float | None, own: list[int], totals: list[int]) -> None:
    """Say once that a prompt brings another budget than the model's, which somebody may have set in vain."""
    if totals != own:
        warn_once(
            "budget of the prompt",
            f"The prompt was written for num_visual_tokens={totals}, which replaces the model's own "
            f"prunesid_config.budget={budget}. Set processor.num_visual_tokens to the budget that you want, or to "
            "None: then it writes full prompts, which leave the budget to the model.",
        )


def _total(
    settings: PretrainedConfig, budget: Any, views: Sequence[int], full_view: int | None, is_total: bool
) -> int:
    """N of an input, of a budget of the whole of it (`is_total`) or of each of its views."""
    if budget is None:
        return sum(views)
    return resolve_budget(budget, sum(views)) if is_total else sum(nominal_budgets(settings, budget, views, full_view))


def nominal_budgets(
    settings: PretrainedConfig, budget: int | float, num_tokens: Sequence[int], full_view: int | None = None
) -> list[int]:
    """N of each view of `num_tokens`. A share stands for no fewer tokens than `settings.min_budget`."""
    counts = [resolve_budget(budget, tokens if full_view is None else full_view) for tokens in num_tokens]
    if isinstance(budget, float) and settings.min_budget is not None:
        counts = [max(count, settings.min_budget) for count in counts]
    return [min(count, tokens) for count, tokens in zip(counts, num_tokens)]


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
    shares = [min(minimum, tokens) for tokens in num_tokens]
    if len(set(weights)) > 1:
        return DYNAMIC.share_by_weight(total - sum(shares), weights, num_tokens, shares)
    while sum(shares) < total:  # as many to each, which is the same, until the first is full
        left = total - sum(shares)
        not_full = [view for view, tokens in enumerate(num_tokens) if shares[view] < tokens]
        step = min([left // len(not_full), *(num_tokens[view] - shares[view] for view in not_full)])
        for view in not_full if step else not_full[:left]:
            shares[view] += max(step, 1)
    return shares


def choose_tokens(
    settings: PretrainedConfig,
    views: torch.Tensor,
    lengths: list[int],
    budgets: Budgets,
    *,
    lambda_of_share: bool = False,
    seen: dict[str, torch.Tensor] | None = None,
    information: Callable[..., list[float]] | None = None,
) -> Chosen:
    """
    The kept tokens of all views of several inputs.

    Args:
        settings (`PruneSIDConfig`).
        views (`torch.Tensor` of shape `(views, tokens, dim)`): the features that are compared, padded.
        lengths (`list[int]`): how many of them each view has.
        budgets ([`Budgets`]).
        lambda_of_share (`bool`): lambda is 18 N/T where `settings` have none, in place of N/32.
        seen (`dict[str, torch.Tensor]`, *optional*):
            `(views, tokens, ...)`: what else of the tokens the method reads, by its name in [`Context`].
        information (`Callable`, *optional*): the scores that a total is shared by, in place of `view_information`.
    """
    settings.check()
    extra_kept, counts = budgets.extra_kept, []
    all_tokens = [(tokens, whole) for own, whole in zip(budgets.num_tokens, budgets.is_whole) for tokens in own]
    for share, length, (tokens, whole) in zip(
        _shares(settings, views, lengths, budgets, information), lengths, all_tokens
    ):
        count = 0 if tokens <= extra_kept else min(share - extra_kept, length)
        if count < 1 and tokens > extra_kept:
            raise ValueError(
                f"prunesid_config.budget must exceed the {extra_kept} tokens that are kept besides the patches, got "
                f"{share}. Raise it{', or min_budget,' if budgets.rule == 'reference' else ''} to at least "
                f"{extra_kept + 1}."
            )
        counts.append(length if whole else count)
    chosen = [view for view, (count, length) in enumerate(zip(counts, lengths)) if 0 < count < length]
    most, device = max(counts), views.device
    indices = torch.arange(most, device=device).expand(len(views), -1)
    merged = None
    if chosen:
        everything = len(chosen) == len(views)
        rows = None if everything else torch.tensor(chosen).to(device, non_blocking=True)

        def part(values: Any) -> Any:
            return values if everything else values.index_select(0, rows)

        chosen_counts = [counts[view] for view in chosen]
        if reads_question(settings):
            seen = {**(seen or {}), "relevance": _relevance(settings, views, lengths, budgets, seen or {})}
        found = None if torch.compiler.is_compiling() else SELECTIONS.get()
        context = Context(
            counts=chosen_counts,
            lengths=None if set(lengths) == {views.shape[1]} else [lengths[view] for view in chosen],
            extra_kept=extra_kept,
            lambda_of_share=lambda_of_share,
            details=found is not None,
            **{name: part(value) for name, value in (seen or {}).items()},
        )
        selection = method_of(settings.method)(part(views), counts_on(device, chosen_counts), settings, context)
        if found is not None:
            found.append((selection, part(views), context, chosen, counts, lengths))
        kept = torch.nn.functional.pad(selection.indices, (0, most - selection.indices.shape[1]))
        indices = kept if everything else indices.index_copy(0, rows, kept)
        if selection.merged is not None:
            merged = Merged(chosen, chosen_counts, selection.indices, selection.merged)
    return Chosen(indices, counts, merged)


def _relevance(
    settings: PretrainedConfig,
    views: torch.Tensor,
    lengths: list[int],
    budgets: Budgets,
    seen: dict[str, torch.Tensor],
) -> torch.Tensor:
    """How near each token `(views, tokens)` is to the question of its row."""
    question = ASKED.get()
    if question is None:
        raise ValueError(
            f"prunesid_config.method_settings={settings.method_settings!r} chooses tokens by the question, which "
            "images alone do not have. Pass them to `generate` or `forward` with their prompt."
        )
    return question.weigh(seen.get("projected", views), lengths, budgets.num_tokens, budgets.totals)


def _shares(
    settings: PretrainedConfig,
    views: torch.Tensor,
    lengths: list[int],
    budgets: Budgets,
    information: Callable[..., list[float]] | None,
) -> list[int]:
    """N of each view, with what is kept besides. Looks at the features only where budgets follow information."""
    of_inputs, extra_kept = budgets.num_tokens, budgets.extra_kept
    if budgets.rule == "reference":
        nominal = [nominal_budgets(settings, settings.budget, own, budgets.full_view) for own in of_inputs]
        return DYNAMIC.adjusted(settings, views, lengths, list(itertools.chain(*nominal)), extra_kept)
    firsts = list(itertools.accumulate(map(len, of_inputs), initial=0))
    weights = [1.0] * len(lengths)
    if budgets.rule == "information":
        weights = (information or DYNAMIC.information)(views, lengths, firsts)
    shares = []
    for own, total, first in zip(of_inputs, budgets.totals, firsts):
        shares += share_total(total, weights[first : first + len(own)], own, minimum=extra_kept + 1)
    return shares
