"""Statistics of right and wrong answers: accuracy by question type, F1, the question-only prior, paired bootstrap."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from prunesid_cli.scenes import KINDS, VARIANTS, Question


PRIOR_STRENGTH = 10


def fit_prior(questions: Iterable[Question]) -> Callable[[Question], str]:
    """The question-only baseline: the best answer without the picture, learned on `questions` without their pictures.

    It is the most frequent answer to the very wording; the answers to the question's template, whatever the noun,
    count as `PRIOR_STRENGTH` further observations, so that rare nouns do not decide by chance.
    """
    by_template: dict[str, Counter] = defaultdict(Counter)
    by_words: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for question in questions:
        by_template[question.words[0]][question.answer] += 1
        by_words[question.words][question.answer] += 1

    def guess(question: Question) -> str:
        general, special = by_template[question.words[0]], by_words[question.words]
        return max(
            sorted(general), key=lambda a: special[a] + PRIOR_STRENGTH * general[a] / general.total(), default=""
        )

    return guess


def as_compared(answer: str) -> str:
    """An answer in lower case without a full stop at its end: "Yes." counts as "yes"."""
    return answer.lower().rstrip(".")


def f1(answers: Sequence[str], truths: Sequence[str]) -> float:
    """F1 of the answer "yes", as POPE reports it; 0 where no "yes" is right."""
    hits = sum(answer == truth == "yes" for answer, truth in zip(answers, truths, strict=True))
    said, true = list(answers).count("yes"), list(truths).count("yes")
    return 2 * hits / (said + true) if hits else 0.0


def tally(values: np.ndarray, scenes: np.ndarray, kinds: np.ndarray, num_kinds: int) -> np.ndarray:
    """Sums (scenes, kinds) of `values` (questions,), whose scene and kind are numbered in `scenes` and `kinds`."""
    sums = np.zeros((scenes.max() + 1, num_kinds))
    np.add.at(sums, (scenes, kinds), values)
    return sums


def resample(scenes: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each draw of the bootstrap takes each scene, (1 + draws, scenes). Row 0 takes each once.

    Methods that are compared on the same rows are compared on the same scenes: the bootstrap is paired.
    """
    drawn = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), size=draws)
    return np.concatenate([np.ones((1, scenes)), drawn])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotients; NaN where the denominator is 0."""
    denominator = np.broadcast_to(denominator, numerator.shape)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def over_kinds(values: np.ndarray) -> np.ndarray:
    """Mean (draws,) of values (draws, kinds), without the kinds that are NaN; NaN where all are."""
    return ratio(np.nansum(values, 1), (~np.isnan(values)).sum(1).astype(float))


def share_of_full(accuracy: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Mean accuracy over question types, as a share of that with all tokens; both are (draws, kinds).

    The paper (Table 1) averages the shares of the benchmarks instead, which a type at the level of chance would sway.
    """
    return ratio(over_kinds(accuracy), over_kinds(full))


def share_above_prior(accuracy: np.ndarray, full: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The share kept of what pictures add to the questions: (accuracy - prior) / (full - prior), means over types."""
    return ratio(over_kinds(accuracy - prior), over_kinds(full - prior))


def interval(values: np.ndarray) -> dict[str, float | None]:
    """Value of row 0 of `resample`, and the 95% percentile interval of the others. None stands for NaN."""
    low, high = np.nanpercentile(values[1:], (2.5, 97.5)) if not np.isnan(values[1:]).all() else (np.nan, np.nan)
    named = {"value": values[0], "low": low, "high": high}
    return {name: _number(value) for name, value in named.items()}


def is_within(budget: int, tokens: float) -> bool:
    """Whether the measured mean keeps to the budget, within 1% or the half token that rounding may add."""
    return tokens <= budget + max(0.01 * budget, 0.5)


FILTER = "downsample-image"


def hard_questions(right: dict, budget: int) -> np.ndarray | None:
    """
    Which questions are hard at a budget: those that the model answers correctly with all tokens and incorrectly with
    an image downsampled to that budget (VTC-Bench, arXiv 2510.07143). None where `downsample-image` was not run.

    Args:
        right (`dict`): for each case (method and budget), whether each question was answered correctly.
    """
    if (FILTER, budget) not in right:
        return None
    return next(hits for (method, _), hits in right.items() if method == "full") & ~right[FILTER, budget]


def summarise(found: dict, guess: Callable[[Question], str]) -> dict:
    """All figures of an evaluation, from what `evaluate.collect` found and the answers that `guess` gives unseen.

    `rows` has one entry for each method and budget, "full" first. `behind_best` is the relative accuracy minus the
    highest one at that budget among the methods that keep to it, `is_within_budget`; also for each variant of the
    scenes. `to_full_by_type` is the accuracy of each question type minus that with all tokens.
    `hard` is the accuracy on the budget's [`hard_questions`], whatever their type, or None.
    Answers are compared in any case and with or without a full stop (`as_compared`).
    """
    questions, scenes = found["questions"], np.array(found["scenes"])
    truths = [as_compared(question.answer) for question in questions]
    kinds = np.array([KINDS.index(question.kind) for question in questions])
    given = {case: [as_compared(answer) for answer in answers] for case, answers in found["answers"].items()}
    weights = resample(len(found["variants"]))
    asked = tally(np.ones(len(questions)), scenes, kinds, len(KINDS))
    of_variant = {variant: np.array(found["variants"]) == variant for variant in VARIANTS}

    def is_right(answers: Sequence[str]) -> np.ndarray:
        return np.array([answer == truth for answer, truth in zip(answers, truths, strict=True)])

    def right(answers: Sequence[str]) -> np.ndarray:
        return tally(is_right(answers).astype(float), scenes, kinds, len(KINDS))

    def accuracy(hits: np.ndarray, counted: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(draws, kinds)"""
        drawn = weights[:, counted]
        return ratio(drawn @ hits[counted], drawn @ asked[counted])

    def by_type(values: np.ndarray) -> dict[str, float | None]:
        return {kind: _number(value) for kind, value in zip(KINDS, values[0], strict=True)}

    prior = accuracy(right([as_compared(guess(question)) for question in questions]))
    hits = {case: right(answers) for case, answers in given.items()}
    each = {case: is_right(answers) for case, answers in given.items()}
    hard = {budget: hard_questions(each, budget) for _, budget in given}
    full_hits = next(values for (method, _), values in hits.items() if method == "full")
    full = accuracy(full_hits)
    tokens = found["tokens"]
    shares = {
        name: {case: share_of_full(accuracy(own, counted), accuracy(full_hits, counted)) for case, own in hits.items()}
        for name, counted in {"all": slice(None), **of_variant}.items()
    }

    def behind_best(case: tuple[str, int], scenes: str) -> dict[str, float | None]:
        at_budget = [rival for rival in hits if rival[1] == case[1]]
        rivals = [rival for rival in at_budget if is_within(rival[1], tokens[rival])] or at_budget
        best = max(rivals, key=lambda rival: np.nan_to_num(shares[scenes][rival][0], nan=-1))
        return interval(shares[scenes][case] - shares[scenes][best])

    def on_hard(case: tuple[str, int]) -> dict[str, float | None] | None:
        is_hard = hard[case[1]]
        if is_hard is None:
            return None
        rightly, counted = (
            weights @ tally(chosen.astype(float), scenes, kinds, len(KINDS)).sum(1)
            for chosen in (each[case] & is_hard, is_hard)
        )
        return interval(ratio(rightly, counted))

    rows = []
    for (method, budget), answers in given.items():
        seen = accuracy(hits[method, budget])
        presence = [(a, t) for a, t, q in zip(answers, truths, questions, strict=True) if q.kind == "presence"]
        rows.append(
            {
                "method": method,
                "budget": budget,
                "tokens": round(tokens[method, budget], 1),
                "is_within_budget": is_within(budget, tokens[method, budget]),
                "accuracy": interval(over_kinds(seen)),
                "by_type": by_type(seen),
                "to_full_by_type": dict(zip(KINDS, map(interval, (seen - full).T), strict=True)),
                "presence_f1": _number(f1(*zip(*presence, strict=True)) if presence else np.nan),
                "share_of_full": interval(shares["all"][method, budget]),
                "hard": on_hard((method, budget)),
                "share_above_prior": interval(share_above_prior(seen, full, prior)),
                "behind_best": behind_best((method, budget), "all"),
                "share_by_variant": {name: interval(shares[name][method, budget]) for name in VARIANTS},
                "behind_best_by_variant": {name: behind_best((method, budget), name) for name in VARIANTS},
            }
        )
    return {
        "scenes": len(found["variants"]),
        "questions": len(questions),
        "full_accuracy": _number(over_kinds(full)[0]),
        "by_type": by_type(full),
        "prior": _number(over_kinds(prior)[0]),
        "prior_by_type": by_type(prior),
        "hard_questions": {str(budget): int(chosen.sum()) for budget, chosen in hard.items() if chosen is not None},
        "rows": rows,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
