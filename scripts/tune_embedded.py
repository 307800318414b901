"""What `prunesid tune` wins back on the embedded model: its accuracy at a budget, tuned and untuned, beside a ceiling.

Trains the projector and the language model on questions about synthetic scenes, for each method and budget under its
own selection. Then the untuned model, each tuned one (with all tokens too, to tell what training alone wins), and the
selector that is told where everything is drawn (`ceiling.py`, on the untuned model) answer the same questions about
scenes that were not trained on.

    python scripts/tune_embedded.py --split val --scenes 96        # to choose settings
    python scripts/tune_embedded.py                                # test scenes, once; about 20 CPU minutes a training
"""

import argparse
import json
import sys
from pathlib import Path

import ceiling
from tqdm import tqdm

from prunesid_cli import tune
from prunesid_cli.answer_statistics import summarise
from prunesid_cli.baselines import random_choice
from prunesid_cli.baselines.seam import registered
from prunesid_cli.command import build_parser
from prunesid_cli.evaluate import Answers, basis_of, collect, load_model
from prunesid_cli.evaluation_pages import ranged
from prunesid_cli.measuring import machine
from prunesid_cli.scenes import SPLITS
from prunesid_cli.tune_scenes import write_rows


METHODS = {"paper": "prunesid-auto", "spread": "prunesid-spread", "random_choice": "random"}
TRAINED = r"^(model\.multi_modal_projector|model\.language_model|lm_head)"


def train(method: str, budget: int, rows: Path, arguments: argparse.Namespace) -> dict:
    """The report of a training, which is kept beside its variant."""
    output = arguments.output / f"{method}-{budget}"
    report = output.with_suffix(".json")
    if not report.exists():
        given = ["tune", str(rows), "--output", str(output), "--budget", str(budget), "--method", method]
        given += ["--train", TRAINED, "--held-out", "0", "--batch-size", "16", "--save-steps", "200"]
        given += ["--max-steps", str(arguments.max_steps), "--learning-rate", str(arguments.learning_rate)]
        found = tune.run(build_parser("tune", tune).parse_args(given))
        report.write_text(json.dumps(found))
    return json.loads(report.read_text())


def answers_of(folder: Path | None, cases: list[tuple[str, int]], arguments: argparse.Namespace) -> dict:
    """What a model answers, as `evaluate.collect` gives it."""
    model, processor = load_model(folder)
    known = Answers(arguments.output / "answers.jsonl", basis_of(model), None)
    return collect(model, processor, cases, arguments.scenes, arguments.split, arguments.questions, known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--max-steps", type=int, default=1700)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--scenes", type=int, default=200, help="that answers are measured on")
    parser.add_argument("--questions", type=int, default=4, help="of each of them")
    parser.add_argument("--output", type=Path, default=Path("out/tuned"))
    arguments = parser.parse_args()
    rows = arguments.output / "rows" / "train.jsonl"
    if not rows.exists():
        write_rows("train", 1200, 6, rows.parent)
    cases = [(method, budget) for method in arguments.methods for budget in arguments.budgets]
    reports = {}
    with registered(random_choice):
        for method, budget in tqdm(cases, desc="trainings"):
            reports[method, budget] = train(method, budget, rows, arguments)
        untuned = [(METHODS[method], budget) for method, budget in cases]
        found = answers_of(None, [("full", 576), *untuned], arguments)
        for case in cases:
            own = {("full", 576): "whole", (METHODS[case[0]], case[1]): "tuned"}
            tuned = answers_of(arguments.output / "{}-{}".format(*case), list(own), arguments)
            for asked, name in own.items():
                for field in ("answers", "tokens"):
                    found[field][f"{case[0]} {name}", case[1]] = tuned[field][asked]
    shares = {(row["method"], row["budget"]): row["share_of_full"] for row in summarise(found, lambda _: "")["rows"]}
    model, processor = load_model(None)
    told = ceiling.measure(model, processor, arguments.split, arguments.scenes, arguments.questions)["rows"]
    knows = {row["budget"]: row["share_of_full"] for row in told}
    print(f"{machine()}; {len(found['questions'])} questions, {len(found['variants'])} {arguments.split} scenes\n")
    print("| method | tokens | CPU minutes | untuned | tuned | tuned, all tokens | knows the scene, untuned |")
    print("|---|---|---|---|---|---|---|")
    for method, budget in cases:
        cells = [shares[METHODS[method], budget], *(shares[f"{method} {name}", budget] for name in ("tuned", "whole"))]
        minutes = reports[method, budget]["cpu_minutes"]
        print(f"| {method} | {budget} | {minutes} | {' | '.join(map(ranged, [*cells, knows[budget]]))} |")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
