"""The pages of an evaluation: a table for the terminal, Markdown, JSON, and curves of accuracy."""

import json
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from prunesid_cli.scenes import KINDS, VARIANTS
from prunesid_cli.tables import print_rows


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def ranged(interval: dict[str, float | None] | None) -> str:
    """Value and 95% interval in percent."""
    if interval is None or interval["value"] is None:
        return "-"
    return f"{percent(interval['value'])} ({percent(interval['low'])} to {percent(interval['high'])})"


def columns(row: dict, with_hard: bool) -> dict[str, str]:
    """What a table shows of a row of `answer_statistics.summarise`, in percent, times and memory apart."""
    shown = {
        "method": row["method"],
        "side": row["place"],
        "budget": str(row["budget"]),
        "tokens": f"{row['tokens']:.1f}",
        **{kind: percent(row["by_type"][kind]) for kind in KINDS},
        "F1": percent(row["presence_f1"]),
        "accuracy": percent(row["accuracy"]["value"]),
        **({"hard": ranged(row["hard"])} if with_hard else {}),
        "relative accuracy": ranged(row["share_of_full"]),
        "above baseline": ranged(row["share_above_prior"]),
        "vs. best": ranged(row["behind_best"]),
        **{variant: ranged(row["share_by_variant"][variant]) for variant in VARIANTS},
    }
    if "first_token_ms" in row:
        shown |= {"first token": f"{row['first_token_ms']:.0f} ms", "memory": f"{row['peak_mib']:.0f} MiB"}
    return shown


def prior_columns(result: dict) -> dict[str, str]:
    kinds = {kind: percent(result["prior_by_type"][kind]) for kind in KINDS}
    return {"method": "question-only baseline", **kinds, "accuracy": percent(result["prior"])}


def print_table(result: dict) -> None:
    """The terminal's table, best of each budget first; the variants stand on the page alone."""
    rows = [columns(row, bool(result["hard_questions"])) for row in ordered(result["rows"])]
    shown = [
        {name: text for name, text in row.items() if name not in VARIANTS} for row in [*rows, prior_columns(result)]
    ]
    title = f"{result['questions']} questions about {result['scenes']} {result['split']} scenes, in percent"
    print_rows(shown, title, left=("side",))


def ordered(rows: list[dict]) -> list[dict]:
    """By falling budget, and within one by falling relative accuracy."""
    return sorted(rows, key=lambda row: (-row["budget"], -(row["share_of_full"]["value"] or 0)))


def winners(rows: list[dict]) -> list[dict[str, str]]:
    """Of each budget, and each variant of the scenes: the best method that keeps to the budget, and who equals it."""
    lines = []
    for budget in sorted({row["budget"] for row in rows if row["method"] != "full"}, reverse=True):
        within = [row for row in rows if row["budget"] == budget and row["is_within_budget"]]
        for scenes in ("all", *VARIANTS):
            shares = {row["method"]: _of(row, "share", scenes) for row in within}
            shares = {name: share for name, share in shares.items() if share["value"] is not None}
            if not shares:
                continue
            best = max(shares, key=lambda name: shares[name]["value"])
            behind = {row["method"]: _of(row, "behind_best", scenes) for row in within}
            equal = [name for name in shares if name != best and behind[name]["high"] >= 0]
            equal.sort(key=lambda name: -shares[name]["value"])
            lines.append(
                {
                    "budget": str(budget),
                    "scenes": scenes,
                    "best": best,
                    "relative accuracy": ranged(shares[best]),
                    "ties with it (vs. best)": ", ".join(f"{n} ({ranged(behind[n])})" for n in equal),
                }
            )
    return lines


def _of(row: dict, field: str, scenes: str) -> dict[str, Any]:
    if scenes == "all":
        return row["share_of_full" if field == "share" else field]
    return row[f"{field}_by_variant"][scenes]


def grid(rows: list[dict[str, str]]) -> list[str]:
    """The lines of a Markdown table, whose columns are those of the first row."""
    names = list(rows[0])
    cells = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in cells]


def markdown(result: dict, page: str) -> str:
    """The text of the page with the name `page`, under the title that its words make."""
    shown = [columns(row, bool(result["hard_questions"])) for row in ordered(result["rows"])]
    won = winners(result["rows"])
    calibrated = []
    if "reference_information" in result:
        calibrated = [
            "Dynamic methods (`-dyn`) give N tokens to an image with the mean information score of these scenes, "
            f"{result['reference_information']:.4f}.",
            "",
        ]
    hard = []
    if result["hard_questions"]:
        counts = [f"{count} at {budget}" for budget, count in result["hard_questions"].items()]
        hard = [
            "`hard`: accuracy on the hard questions of the budget. A question is hard if it is answered correctly "
            "with all tokens and incorrectly with a downsampled image (`downsample-image`) of the same budget: "
            f"{', '.join(counts)} tokens. It is 100% for all tokens and 0% for the downsampled image by construction, "
            "each budget has its own questions, and answers of few choices can be guessed. `downsample-enlarged` "
            "reads the same small image, enlarged again, with all tokens: it separates the loss of pixels from that "
            "of the coarse patch grid.",
            "",
        ]
    lines = [
        f"# {page.replace('_', ' ').capitalize()} at every budget",
        "",
        f"{result['questions']} questions about {result['scenes']} scenes (split `{result['split']}`). All methods "
        "have the same model, images, prompts and greedy decoding. In percent, with 95% intervals of a paired "
        "bootstrap over scenes in brackets.",
        "",
        *grid(
            [
                {"column": f"`{name}`", "meaning": meaning}
                for name, meaning in {
                    "side": "where tokens are dropped: before the language model (encoder), inside it (llm), or both",
                    "tokens": "mean visual tokens of an image, as measured; for methods inside the language model, "
                    "the mean over its layers too",
                    "accuracy": "mean over question types",
                    "relative accuracy": "accuracy / accuracy with all tokens; also for each variant of the scenes",
                    "above baseline": "the same, after the question-only baseline is subtracted from both",
                    "vs. best": "relative accuracy minus that of the best method within the budget",
                }.items()
            ]
        ),
        "",
        *calibrated,
        *hard,
        f"Measured on {result['machine']}.",
        "",
        *grid([shown[0], prior_columns(result), *shown[1:]]),
        "",
        f"![Relative accuracy against tokens and, where it was measured, time to first token]({page}.png)",
        "",
    ]
    if won:
        lines += [
            "## Best method by budget",
            "",
            "Of the methods within the budget, on all scenes and on each variant. A method ties with the best if the "
            "95% interval of the difference includes 0.",
            "",
            *grid(won),
            "",
        ]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """
    Relative accuracy against tokens and, where it was measured, time to first token: one line a method, PruneSID's
    with their intervals. Controls that keep all tokens are left out.
    """
    full, *rows = result["rows"]
    rows = [row for row in rows if row.get("place") != full.get("place", "nowhere")]
    against = {"tokens": "visual tokens of a picture (mean)"}
    if "first_token_ms" in full:
        against["first_token_ms"] = "time to first token (ms)"
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes_grid = pyplot.subplots(1, len(against), figsize=(6.5 * len(against) + 2, 4.8), squeeze=False, dpi=130)
    colours = pyplot.get_cmap("tab20" if len(methods) > 10 else "tab10")
    for axes, (field, label) in zip(axes_grid[0], against.items()):
        for number, method in enumerate(methods):
            points = [row for row in rows if row["method"] == method and row["share_of_full"]["value"] is not None]
            points.sort(key=lambda row: row["tokens"])
            x = [row[field] for row in points]
            value, low, high = ([row["share_of_full"][name] for row in points] for name in ("value", "low", "high"))
            style, is_ours = "-" if number < 20 else "--", method.startswith("prunesid")
            look = {"linewidth": 2.4, "markersize": 5} if is_ours else {"linewidth": 0.9, "markersize": 2.5}
            axes.plot(x, value, style, marker="o", color=colours(number % 20), label=method, **look)
            if field == "tokens" and is_ours:
                axes.fill_between(x, low, high, color=colours(number % 20), alpha=0.12, linewidth=0)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    tokens = [row["tokens"] for row in rows]
    axes_grid[0][0].set_xlim(min(tokens) / 1.2, max(tokens) * 1.2)
    axes_grid[0][0].set_xscale("log", base=2)
    axes_grid[0][0].xaxis.set_major_formatter(ScalarFormatter())
    axes_grid[0][0].set_ylabel("relative accuracy")
    axes_grid[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def write_pages(folder: Path, page: str, result: dict) -> None:
    """`page.json`, `page.md` and `page.png` in `folder`."""
    (folder / f"{page}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{page}.md").write_text(markdown(result, page))
    draw(result, folder / f"{page}.png")
