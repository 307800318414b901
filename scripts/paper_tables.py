"""Measure a table of the paper with lmms-eval, the paper's figures beside: one command a table.

    python scripts/paper_tables.py 1 --out out/table1 --lmms-python ../lmms-venv/bin/python

makes the variants of the table, runs lmms-eval once for each of them and each benchmark, and ends in a Markdown
table (`OUT/table.md`), measured figures first and the paper's in brackets. Benchmarks that have their results are not
run again, so a run that was stopped goes on where it was; one that failed is named, does not cost the others, and is
tried again by the next run. The average is, as the paper's, the mean share of the uncompressed model over the
benchmarks that both rows have. docs/lmms_eval.md says how lmms-eval is installed, and which figures are not quite the
paper's.

    python scripts/paper_tables.py 1 --out out/table1 --rows vanilla 64 --columns POPE MME     # some of it
    python scripts/paper_tables.py 1 --out out/trial --base TINY --trial --device cpu          # without a network

With `--trial`, lmms-eval's own definitions of POPE, MME, SQA, VQA Text and VizWiz ask about pictures that are made up
here: the prompts, filters and metrics are the real ones, the figures mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from prunesid_cli.evaluation_pages import grid


@dataclass(frozen=True)
class Column:
    """A benchmark: the task of lmms-eval 0.7.3, the metrics whose sum it is, their scale, and what else it wants."""

    task: str
    metrics: tuple[str, ...]
    scale: float = 100
    judged: bool = False


COLUMNS = {
    "GQA": Column("gqa", ("exact_match",)),
    "MMB": Column("mmbench_en_dev", ("gpt_eval_score",), 1, judged=True),
    "MME": Column("mme", ("mme_perception_score", "mme_cognition_score"), 1),
    "POPE": Column("pope", ("pope_f1_score",)),
    "SQA": Column("scienceqa_img", ("exact_match",)),
    "VQA v2": Column("vqav2_val", ("exact_match",)),  # the paper's questions are those of a server
    "VQA Text": Column("textvqa_val", ("exact_match",)),
    "MMMU": Column("mmmu_val", ("mmmu_acc",)),
    "SEED": Column("seedbench", ("seed_all",)),
    "SEED-I": Column("seedbench", ("seed_image",)),
    "VizWiz": Column("vizwiz_vqa_val", ("exact_match",)),
    "LLaVA-B": Column("llava_in_the_wild", ("gpt_eval_llava_all",), 1, judged=True),
    "A-Net": Column("activitynetqa", ("gpt_eval_accuracy",), 1, judged=True),
}


@dataclass(frozen=True)
class Row:
    """A model of a table: its preset (None is the uncompressed model) and the paper's figures, None where unknown."""

    name: str
    preset: str | None
    paper: tuple[float | None, ...]
    average: float

    @property
    def dynamic(self) -> bool:
        return self.name.endswith("-dyn")


@dataclass(frozen=True)
class Table:
    base: str | None
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    arguments: str = "dtype=float16"


_OF_1 = ("GQA", "MMB", "MME", "POPE", "SQA", "VQA v2", "VQA Text", "MMMU", "SEED", "VizWiz", "LLaVA-B")
_OF_2 = ("GQA", "MMB", "MME", "POPE", "SQA", "VQA v2", "MMMU")
TABLES = {
    1: Table(
        "llava-hf/llava-1.5-7b-hf",
        _OF_1,
        (
            Row("vanilla", None, (61.9, 64.7, 1862, 85.9, 69.5, 78.5, 58.2, 36.3, 60.5, 54.3, 66.8), 100),
            Row("192", "llava_1.5_192", (60.1, 63.7, 1791, 86.9, 68.5, 76.8, 56.7, 36.1, 59.0, 55.4, 65.1), 98.5),
            Row("192-dyn", "llava_1.5_192", (60.2, 63.8, 1797, 87.1, 69.1, 76.8, 56.9, 36.8, 59.0, 55.5, 65.1), 98.6),
            Row("128", "llava_1.5_128", (58.8, 62.1, 1749, 86.5, 68.3, 75.3, 54.7, 35.8, 57.8, 55.8, 68.8), 97.6),
            Row("128-dyn", "llava_1.5_128", (58.9, 62.6, 1760, 86.9, 68.8, 75.4, 55.1, 36.3, 57.9, 56.0, 68.9), 98.1),
            Row("64", "llava_1.5_64", (57.1, 58.8, 1733, 83.8, 67.8, 73.7, 54.2, 37.0, 56.1, 56.9, 65.2), 95.9),
            Row("64-dyn", "llava_1.5_64", (57.2, 59.7, 1734, 84.1, 68.1, 73.8, 54.2, 37.2, 56.2, 57.0, 65.8), 96.3),
        ),
    ),
    2: Table(
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        (*_OF_2, "SEED"),
        (
            Row("vanilla", None, (64.2, 67.9, 1842, 86.4, 70.2, 80.1, 35.1, 70.2), 100),
            Row("640", "llava_next_640_128_per_crop", (61.6, 64.2, 1795, 86.3, 68.3, 78.5, 37.9, 67.3), 98.4),
            Row("320", "llava_next_320_64_per_crop", (60.5, 63.0, 1754, 83.1, 67.3, 76.6, 36.4, 65.0), 95.8),
            Row("160", "llava_next_160_32_per_crop", (58.9, 60.8, 1704, 76.9, 67.1, 73.8, 36.2, 62.5), 92.8),
        ),
    ),
    3: Table(
        None,  # a converted checkpoint, see docs/lmms_eval.md
        (*_OF_2, "SEED-I"),
        (
            Row("vanilla", None, (62.4, 69.3, 1841, 85.8, 70.7, 80.4, 36.1, 69.7), 100),
            Row("192", "mini_gemini_192", (61.2, 67.2, 1842, 84.4, 71.1, 79.1, 36.1, None), 98.7),
            Row("128", "mini_gemini_128", (60.1, 66.6, 1821, 82.4, 70.7, 77.8, 36.0, 66.5), 97.4),
            Row("64", "mini_gemini_64", (None, None, None, None, None, None, None, 63.6), 94.4),
        ),
    ),
    4: Table(
        "LanguageBind/Video-LLaVA-7B-hf",
        ("A-Net",),
        (Row("vanilla", None, (43.1,), 100), Row("136", "video_llava_136_17_per_frame", (43.1,), 95.5)),
        "dtype=float16,max_frames_num=8",
    ),
}  # fmt: skip
CALIBRATED_ON = ("lmms-lab/MMMU", "--split", "validation", "--column", "image_1")
TRIALS = {"POPE": "pope/pope", "MME": "mme/mme", "SQA": "scienceqa/scienceqa_img", "VQA Text": "textvqa/textvqa_val",
          "VizWiz": "vizwiz_vqa/vizwiz_vqa_val"}  # fmt: skip


def call(command: list[str], log: Path) -> bool:
    """Run a command, whose output goes to a file; whether it succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        print(f"FAILED, see {log}: {' '.join(last)[:200]}", flush=True)
    return done.returncode == 0


def variant_of(row: Row, base: str, out: Path) -> Path | None:
    """The folder of a row's variant, made unless it is there; None if that failed."""
    folder, name = out / "variants" / row.name, row.preset
    if (folder / "config.json").exists():
        return folder
    prunesid = [sys.executable, "-m", "prunesid_cli"]
    if row.dynamic:
        name = str(out / "variants" / f"{row.name}.json")
        source, *options = CALIBRATED_ON
        asked = ["--preset", str(row.preset), "--output", name]
        if not call(
            [*prunesid, "calibrate", base, source, *options, *asked], out / "logs" / f"{row.name}-calibrate.log"
        ):
            return None
    settings = ["--budget", "1.0"] if name is None else ["--preset", name]
    made = call(
        [*prunesid, "convert", base, *settings, "--thin", "--output", str(folder)], out / "logs" / f"{row.name}.log"
    )
    return folder if made else None


def results_of(folder: Path, task: str) -> dict | None:
    """What lmms-eval wrote of a task; None before it has."""
    for path in sorted(folder.glob("**/*_results.json"), reverse=True):
        found = json.loads(path.read_text()).get("results", {}).get(task)
        if found is not None:
            return found
    return None


def value_of(results: dict | None, column: Column) -> float | None:
    """The sum of a column's metrics; None where one is missing. lmms-eval writes `metric,filter`."""
    if results is None:
        return None
    values = [next((v for k, v in results.items() if k.partition(",")[0] == name), None) for name in column.metrics]
    if not all(isinstance(value, int | float) for value in values):
        return None
    return column.scale * sum(value for value in values if isinstance(value, int | float))


def average_of(own: list[float | None], vanilla: list[float | None]) -> float | None:
    """The mean share of the uncompressed model's, in percent, over what both have."""
    shares = [mine / whole for mine, whole in zip(own, vanilla) if mine is not None and whole]
    return 100 * sum(shares) / len(shares) if shares else None


def shown(value: float | None, paper: float | None) -> str:
    def written(number: float | None) -> str:
        return "?" if number is None else f"{number:.0f}" if number > 200 else f"{number:.1f}"

    return f"{'-' if value is None else written(value)} ({written(paper)})"


def table_of(table: Table, names: list[str], measured: dict[str, list[float | None]]) -> list[str]:
    """The lines of the Markdown table, the paper's figures in brackets."""
    lines = []
    for row in table.rows:
        if row.name in measured:
            paper = dict(zip(table.columns, row.paper))
            cells = {name: shown(value, paper[name]) for name, value in zip(names, measured[row.name])}
            average = average_of(measured[row.name], measured.get("vanilla", []))
            lines.append({"": row.name, **cells, "Avg.": f"{shown(average, row.average)} %"})
    return grid(lines)


def write_trials(folder: Path, lmms: Path) -> None:
    """lmms-eval's own definitions of `TRIALS` under `trial_` names, on four made-up questions each."""
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Pillow

    folder.mkdir(parents=True, exist_ok=True)
    text = Value("string")
    features = Features(
        {"image": Image(), "question": text, "answer": text, "question_id": text, "category": text, "hint": text,
         "choices": List(text), "answers": List(text)}
    )  # fmt: skip
    for name, path in TRIALS.items():
        rows = [
            {
                "image": Pillow.new("RGB", (64, 48), (60 * number, 90, 200 - 40 * number)),
                "question": f"Is there any car in the picture? {number}", "answer": ("yes", "no")[number % 2],
                "question_id": str(number // 2), "category": "existence", "hint": "", "choices": ["a", "b"],
                "answers": ["yes"] * 10,
            }
            for number in range(4)
        ]  # fmt: skip
        own = Dataset.from_list(rows, features=features)
        if name == "SQA":
            own = own.remove_columns("answer").add_column("answer", [0, 1, 0, 1])
        if name == "MME":
            own = own.map(lambda row: {"answer": row["answer"].title()})
        task = COLUMNS[name].task
        parquet = (folder / f"{task}.parquet").resolve()
        own.to_parquet(parquet)
        split = {"VQA Text": "validation", "VizWiz": "val"}.get(name, "test")
        (folder / f"trial_{task}.yaml").write_text(
            f"include: {lmms / 'tasks' / path}.yaml\ntask: trial_{task}\ndataset_path: parquet\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    {split}: {parquet}\n"
        )


def lmms_folder(python: str) -> Path:
    code = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"--lmms-python={python} has no lmms_eval. docs/lmms_eval.md says how it is installed.")
    return Path(done.stdout.splitlines()[-1])


def measure(table: Table, arguments: argparse.Namespace) -> tuple[list[str], dict[str, list[float | None]]]:
    """The columns, and the figures of each row; None where there is none."""
    base, out, python = arguments.base or table.base, arguments.out, arguments.lmms_python
    if base is None:
        raise ValueError("--base must name the checkpoint of table 3, converted as docs/lmms_eval.md says. Give it.")
    names = [name for name in arguments.columns or table.columns if not arguments.trial or name in TRIALS]
    rows = arguments.rows or [row.name for row in table.rows if not (arguments.trial and row.dynamic)]
    for given, known, option in (
        (names, table.columns, "columns"),
        (rows, [row.name for row in table.rows], "rows"),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"--{option} must be among {', '.join(known)}, got {name!r}. Correct the name.")
    lmms, prefix, further = lmms_folder(python), "", []
    if arguments.trial:
        write_trials(out / "trials", lmms)
        prefix, further = "trial_", ["--include_path", str((out / "trials").resolve())]
    if arguments.limit:
        further += ["--limit", str(arguments.limit)]
    launch = [python, "-m", "lmms_eval"]
    if arguments.processes > 1:
        launch = [python, "-m", "accelerate.commands.launch", "--num_processes", str(arguments.processes), *launch[1:]]
    measured: dict[str, list[float | None]] = {}
    for row in table.rows:
        if row.name not in rows:
            continue
        variant = variant_of(row, base, out)
        measured[row.name] = []
        for name in names:
            column, folder = COLUMNS[name], out / "results" / row.name / name.replace(" ", "_")
            task = prefix + column.task
            if results_of(folder, task) is None and variant is not None:
                if column.judged and not os.environ.get("OPENAI_API_KEY") and not arguments.trial:
                    print(f"{row.name} {name}: left out, it wants a judge's key in OPENAI_API_KEY", flush=True)
                else:
                    print(f"{row.name} {name} ...", flush=True)
                    given = f"pretrained={variant.resolve()},{table.arguments}"
                    given += f",device={arguments.device}" if arguments.device else ""
                    asked = ["--model", "prunesid", "--model_args", given, "--tasks", task]
                    asked += ["--batch_size", str(arguments.batch_size), "--output_path", str(folder), "--log_samples"]
                    log = out / "logs" / f"{row.name}-{column.task}.log"
                    if call([*launch, *asked, *further], log) and results_of(folder, task) is None:
                        print(f"FAILED, see {log}: lmms-eval ended without results", flush=True)
            measured[row.name].append(value_of(results_of(folder, task), column))
    return names, measured


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=int, choices=TABLES, help="of the paper")
    parser.add_argument("--out", type=Path, required=True, help="folder for variants, results, logs and the table")
    parser.add_argument(
        "--lmms-python", default=sys.executable, help="the Python that has lmms-eval (default: this one)"
    )
    parser.add_argument("--base", help="the checkpoint, in place of the table's")
    parser.add_argument("--rows", nargs="+", help="some of the table's rows (default: all)")
    parser.add_argument("--columns", nargs="+", help="some of the table's benchmarks (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="GPUs, each with a share of the questions")
    parser.add_argument("--limit", type=int, help="so many questions of each benchmark")
    parser.add_argument("--device", help="default: lmms-eval's own")
    parser.add_argument("--trial", action="store_true", help="made-up pictures in place of the benchmarks'")
    arguments = parser.parse_args(argv)
    names, measured = measure(TABLES[arguments.table], arguments)
    lines = table_of(TABLES[arguments.table], names, measured)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    missing = [
        f"{row} {name}" for row, values in measured.items() for name, value in zip(names, values) if value is None
    ]
    print(json.dumps({"table": arguments.table, "page": str(arguments.out / "table.md"), "missing": missing}))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
