"""Write what README and docs/ say of an evaluation, from the JSON that `prunesid evaluate` wrote.

- `docs/which_budget.md`: what a budget costs for each type of question, and where not to prune;
- the tables between `<!-- accuracy -->` and `<!-- end -->` of README.md, with the speed, and of docs/results.md.

After docs/accuracy.json was measured anew, or the speed:

    prunesid demo --model assembled | tail -n 1 > docs/demo.json
    prunesid benchmark --output docs/benchmark.json
    python scripts/results_pages.py
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from prunesid_cli.evaluation_pages import grid, percent, ranged


ROOT = Path(__file__).parents[1]
NAMES = {
    "full": "all tokens",
    "prunesid-spread": "**spread** (ours)",
    "prunesid-auto": '**PruneSID, lambda `"auto"`** (ours)',
    "prunesid-release": "**PruneSID, reference implementation**",
    "prunesid-paper": "**PruneSID, paper**",
    "divprune": "DivPrune",
    "dpp": "DPP, question-blind",
    "vispruner": "VisPruner",
    "hiprune": "HiPrune",
    "cdpruner": "CDPruner (without CLIP's text tower)",
    "tome": "ToMe (inside the tower)",
    "visionzip": "VisionZip",
    "hired": "HiRED",
    "prumerge+": "PruMerge+",
    "downsample-image": "downsampled image",
    "downsample-features": "average-pooled features",
    "downsample-enlarged": "downsampled image, upsampled again, all tokens (control)",
    "uniform": "uniform stride",
    "vitcop": "ViTCoP (mean over the layers)",
    "random": "random",
}
IN_README = (
    "prunesid-spread", "prunesid-release", "prunesid-auto", "prunesid-paper", "divprune", "dpp", "visionzip", "tome",
    "downsample-image", "downsample-enlarged", "random",
)  # fmt: skip
SHOWN = ("prunesid-spread", "prunesid-release", "prunesid-auto", "prunesid-paper", "divprune", "random")
WRITTEN = "This page is written by `python scripts/results_pages.py` from [accuracy](accuracy.md)"
TASKS = {  # question type: what it is here, and where the field asks it
    "presence": ("is there any ...?", "POPE"),
    "count": ("how many ...?", "counting"),
    "where": ("in which corner is ...?", "grounding, GQA"),
    "colour": ("what colour is ...?", "attributes, GQA"),
    "reading": ("what is printed?", "TextVQA, OCR, documents, charts"),
    "region": ("what is the wall made of?", "scenes, background, captions"),
}


def row_of(result: dict, method: str, budget: int) -> dict | None:
    return next((row for row in result["rows"] if (row["method"], row["budget"]) == (method, budget)), None)


def budgets_of(result: dict) -> list[int]:
    return sorted({row["budget"] for row in result["rows"] if row["method"] != "full"}, reverse=True)


def is_level(row: dict) -> bool:
    """Whether the 95% interval of the difference to the best reaches 0."""
    return row["behind_best"]["high"] >= 0


# README and docs/results.md


def accuracy_table(
    result: dict, budgets: list[int], with_time: bool, methods: Sequence[str] = (), speed: Sequence[dict] = ()
) -> list[str]:
    """
    Relative accuracy of the named methods below rows of `speed`; `=` marks those that tie with the best of the budget.
    """
    every = "**relative accuracy**, all tokens" if speed else NAMES["full"]
    lines: list[dict] = [{"method": every, **{f"{budget} tokens": "100" for budget in budgets}}]
    full = row_of(result, "full", result["rows"][0]["budget"])
    if with_time and full and "first_token_ms" in full:
        lines[0] |= {f"first token at {budget}": f"{full['first_token_ms']:.0f} ms" for budget in budgets}
    lines = [*({**dict.fromkeys(lines[0], ""), **row} for row in speed), *lines]
    methods = [name for name in methods or NAMES if name != "full" and row_of(result, name, budgets[0])]
    methods.sort(key=lambda name: -sum(_share(result, name, budget) for budget in budgets))
    for method in methods:
        line = {"method": NAMES[method]}
        for budget in budgets:
            row = row_of(result, method, budget)
            shown = "-" if row is None else ranged(row["share_of_full"])
            line[f"{budget} tokens"] = shown + (" =" if row and row["is_within_budget"] and is_level(row) else "")
            if row and "first_token_ms" in row and with_time:
                line[f"first token at {budget}"] = f"{row['first_token_ms']:.0f} ms"
        lines.append(line)
    count = f"{result['questions']:,} questions about {result['scenes']} {result['split']} scenes"
    return [
        *grid(lines),
        "",
        f"{count}, {result['machine']}. Relative accuracy in percent, with 95% intervals of a paired bootstrap over "
        "scenes in brackets. `=`: ties with the best of that budget (the interval of the difference includes 0). "
        "Downsampling gives 196, 121, 64, 36 and 16 tokens.",
    ]


def speed_rows(demo: dict, benchmark: dict, budgets: list[int]) -> list[dict[str, str]]:
    """What a budget saves, whatever the method: rows for the top of the table of README."""
    cases, prefill, cache = {row["budget"]: row for row in demo["rows"]}, "prefill_ratio", "kv_cache_ratio"
    rows = {
        f"speed-up to the first token, SmolLM2-135M ({demo['rows'][0]['first_token_ms']:,.0f} ms with all tokens)": {
            budget: f"{cases[budget]['speedup']:.2f}x" for budget in budgets
        },
        "speed-up of the prefill, LLaVA-1.5 with a language model of 66 M": {
            b: f"{benchmark[prefill][str(b)]:.1f}x" for b in budgets
        },
        "smaller KV cache": {b: f"{benchmark[cache][str(b)]:.1f}x" for b in budgets},
    }
    return [{"method": name, **{f"{b} tokens": text for b, text in own.items()}} for name, own in rows.items()]


def _share(result: dict, method: str, budget: int) -> float:
    row = row_of(result, method, budget)
    return 0.0 if row is None or row["share_of_full"]["value"] is None else row["share_of_full"]["value"]


def put_table(page: Path, lines: list[str]) -> None:
    """Raises a `ValueError` if the page has no place for the table."""
    text = page.read_text()
    place = re.compile(r"(<!-- accuracy -->\n).*?(<!-- end -->)", re.DOTALL)
    put, count = place.subn(lambda found: "\n".join([found[1], *lines]) + f" {found[2]}", text)
    if count != 1:
        raise ValueError(
            f"{page} must have one pair of <!-- accuracy --> and <!-- end -->, got {count}. Put them back."
        )
    page.write_text(put)


# docs/which_budget.md


def smallest_free(result: dict, method: str, kind: str) -> int | None:
    """The smallest budget at which, as at all larger ones, no loss of the question type can be measured."""
    free = None
    for budget in budgets_of(result):
        row = row_of(result, method, budget)
        if row is None or row["to_full_by_type"][kind]["value"] is None or row["to_full_by_type"][kind]["high"] < 0:
            break
        free = budget
    return free


def cost(interval: dict) -> str:
    return ranged({name: value and round(value, 6) for name, value in interval.items()})


def which_budget(result: dict) -> str:
    budgets, methods = budgets_of(result), [name for name in SHOWN if row_of(result, name, budgets_of(result)[0])]
    full = result["rows"][0]
    free, costs = [], []
    for kind, (example, field) in TASKS.items():
        line = {"type": kind, "here": example, "in the field": field, "all tokens": percent(full["by_type"][kind])}
        line |= {"question-only baseline": percent(result["prior_by_type"][kind])}
        for method in methods:
            budget = smallest_free(result, method, kind)
            line[method] = "none" if budget is None else str(budget)
        free.append(line)
        row = {"type": kind}
        row |= {str(b): cost(row_of(result, methods[0], b)["to_full_by_type"][kind]) for b in budgets}
        costs.append(row)
    return "\n".join(
        [
            "# Which budget for which task",
            "",
            f"The cost of pruning depends on the question. {WRITTEN}: {result['questions']:,} questions about "
            f"{result['scenes']} synthetic scenes, answered by the embedded model (DINOv2-S/14 and a language model "
            "of 1.8 M weights). **Read the order of the tasks from it, not the numbers**: measure your own model on "
            "your own images with `prunesid evaluate --data`.",
            "",
            "## The smallest budget without a measurable loss",
            "",
            "Of 576 tokens: the smallest budget at which the 95% interval of the difference to all tokens still "
            "includes 0. `none`: every budget that was tried costs accuracy. The question-only baseline is the best "
            "guess without the image.",
            "",
            *grid(free),
            "",
            f"## What a budget costs ({methods[0]})",
            "",
            "Difference in accuracy to all tokens, in points, with 95% intervals of a paired bootstrap over scenes:",
            "",
            *grid(costs),
            "",
            "## What follows",
            "",
            *advice(result, methods[0], budgets),
            "",
            "The paper's own figures on LLaVA-1.5 at 64 tokens point the same way: it keeps 97.6% on POPE (presence) "
            "and 93.1% on TextVQA (reading). See [lmms-eval](lmms_eval.md).",
            "",
            "## Find yours",
            "",
            "```bash",
            "prunesid evaluate --out out/mine --data rows.csv --model llava-hf/llava-1.5-7b-hf --budgets 192 128 64",
            "```",
            "",
            "`rows.csv` has the columns `image`, `question`, `answer`. The command says which budget costs nothing "
            "that your rows can measure. A budget can change with the question: "
            "`generate(..., num_visual_tokens=1.0)` keeps all tokens for one call.",
            "",
        ]
    )


def advice(result: dict, method: str, budgets: list[int]) -> list[str]:
    """A sentence for each question type, the one that loses least first."""
    said = []
    for kind in sorted(TASKS, key=lambda kind: -_lost(result, method, budgets[-1], kind)):
        free = smallest_free(result, method, kind)
        costs = {b: row_of(result, method, b)["to_full_by_type"][kind] for b in budgets}
        losses = ", ".join(f"{abs(min(100 * own['value'], 0)):.0f} at {b}" for b, own in costs.items())
        others = {name: smallest_free(result, name, kind) for name in SHOWN if row_of(result, name, budgets[0])}
        better = min((name for name in others if others[name]), key=lambda name: others[name] or 0, default=None)
        if free is not None:
            hidden = abs(min(100 * costs[free]["low"], 0))
            line = f"no loss can be measured down to {free} tokens; one of up to {hidden:.0f} points is not excluded."
        elif better is not None:
            line = f"take {better}, with which no loss can be measured down to {others[better]} tokens."
        else:
            line = "**do not prune** where the answer must be right."
        said.append(f"- {kind} ({TASKS[kind][1]}): {line} Points lost with {method}: {losses}.")
    return said


def _lost(result: dict, method: str, budget: int, kind: str) -> float:
    return row_of(result, method, budget)["to_full_by_type"][kind]["value"] or 0.0


def write(root: Path) -> None:
    result = json.loads((root / "docs" / "accuracy.json").read_text())
    inside = root / "docs" / "accuracy_inside_llm.json"
    if inside.exists():
        result["rows"] += [row for row in json.loads(inside.read_text())["rows"] if row["method"] == "vitcop"]
    if "to_full_by_type" not in result["rows"][0]:
        raise ValueError(
            "docs/accuracy.json has no intervals by question type. Measure it anew: prunesid evaluate --all."
        )
    (root / "docs" / "which_budget.md").write_text(which_budget(result))
    demo, benchmark = (json.loads((root / "docs" / f"{name}.json").read_text()) for name in ("demo", "benchmark"))
    table = accuracy_table(result, [192, 64], True, IN_README, speed_rows(demo, benchmark, [192, 64]))
    put_table(root / "README.md", table)
    put_table(root / "docs" / "results.md", accuracy_table(result, budgets_of(result), with_time=False))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout (default: this one)")
    write(parser.parse_args(argv).root)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
