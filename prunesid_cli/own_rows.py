"""`prunesid evaluate --data`: your own questions, answered by the stock class and with every method and budget.

Rows are a CSV, TSV or JSONL file with `image` (a path beside the file, or a URL), `question` and `answer`, or a folder
that holds one such file. `|` stands between answers that are all right. An answer is right if it equals one of them,
in any case, with or without a full stop; with `contains`, if one of them stands in it as whole words.
"""

import argparse
import csv
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from modeling_prunesid import compress
from prunesid_cli.answer_statistics import as_compared, interval, ratio, resample
from prunesid_cli.baselines import METHODS, applied
from prunesid_cli.batch import Request, read_row
from prunesid_cli.evaluation_pages import grid, percent, ranged
from prunesid_cli.generate import answer_inputs, load, without_ours, write_requests
from prunesid_cli.images import open_image
from prunesid_cli.lines import append_to, read_lines
from prunesid_cli.measuring import machine, peak_bytes, seconds_interleaved
from prunesid_cli.tables import print_rows


COLUMNS = ("image", "question", "answer")
ENDINGS = (".csv", ".tsv", ".jsonl")
TRIED = ("prunesid-paper", "prunesid-spread", "prunesid-auto", "random")
SHARES = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of 576
STOCK, OFF = ("stock", None), ("off", None)
TIMED_ROWS, ROUNDS, MANY = 3, 3, 200
Case = tuple[str, int | float | None]


@dataclass(frozen=True)
class Row:
    """`number` counts from 1; `source` is a path or a URL; each of `answers` is right."""

    number: int
    source: str
    question: str
    answers: tuple[str, ...]


# Reading


def find_file(data: Path) -> Path:
    """
    The file of rows that `--data` names, or that is in the folder that it names.

    Raises:
        `ValueError`: if there is none, or several.
    """
    if data.is_dir():
        files = sorted(path for path in data.iterdir() if path.suffix.lower() in ENDINGS)
        if len(files) != 1:
            found = ", ".join(path.name for path in files) or "none"
            raise ValueError(f"--data must hold one file of rows ({', '.join(ENDINGS)}), got {found} in {data}.")
        return files[0]
    if not data.is_file() or data.suffix.lower() not in ENDINGS:
        raise ValueError(f"--data must be a folder or a file of rows ({', '.join(ENDINGS)}), got {data}.")
    return data


def fields_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and fields of each row that is not blank; a `ValueError` names a line that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}. Save it again in that encoding.") from error
    if path.suffix.lower() != ".jsonl":
        table = csv.DictReader(
            text.splitlines(keepends=True), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
        )
        check_columns(path, table.fieldnames or ())
        yield from ((number, _named(row)) for number, row in enumerate(table, 1))
        return
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            row = read_row(line.encode())
        except ValueError as error:
            raise ValueError(f"Row {number} of {path} cannot be read. {error}") from error
        yield number, _named(row)


def _named(row: dict) -> dict[str, Any]:
    return {str(name).strip().lower(): value for name, value in row.items()}


def check_columns(path: Path, names: Any) -> None:
    missing = [name for name in COLUMNS if name not in [str(own).strip().lower() for own in names]]
    if missing:
        raise ValueError(
            f"{path} must have the columns {', '.join(COLUMNS)}, got {', '.join(names) or 'none'}. Rename or add "
            f"{', '.join(missing)}."
        )


def read_rows(data: Path) -> list[Row]:
    """
    The rows, whose images can all be opened.

    Raises:
        `ValueError`: if there are none, or with what is wrong with the bad ones.
    """
    path = find_file(data)
    rows, wrong, opened = [], [], set()
    for number, fields in fields_of(path):
        try:
            row = _read_row(number, fields, path.parent)
            if row.source not in opened:
                open_image(row.source, str(fields["image"]))
                opened.add(row.source)
            rows.append(row)
        except ValueError as error:
            wrong.append(f"row {number}: {error}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(f"{path} has bad rows; fix or remove them. " + " ".join(wrong[:5]) + more)
    if not rows:
        raise ValueError(f"{path} has no rows. Give some questions about images, with their answers.")
    return rows


def _read_row(number: int, fields: dict[str, Any], folder: Path) -> Row:
    for name in COLUMNS:
        value = fields.get(name)
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise ValueError(f"{name} must be some text, got {value!r:.80}.")
    source = str(fields["image"]).strip()
    if not source.startswith(("http://", "https://", "data:image/")):
        source = str(folder / source)
    answers = tuple(part for part in (as_told(text) for text in str(fields["answer"]).split("|")) if part)
    if not answers:
        raise ValueError(f"answer must be some text, got {fields['answer']!r:.80}.")
    return Row(number, source, str(fields["question"]).strip(), answers)


def as_told(text: str) -> str:
    """In lower case, without a full stop at the end, one blank between words."""
    return as_compared(" ".join(text.split()))


def is_right(answer: str, row: Row, contains: bool) -> bool:
    told = as_told(answer)
    if not contains:
        return told in row.answers
    return any(re.search(rf"(?<!\w){re.escape(true)}(?!\w)", told) for true in row.answers)


# Answering


@contextmanager
def as_stock(model: Any) -> Iterator[None]:
    """Inside, a model of ours is of the stock classes; its modules are the same."""
    settings = model.config.prunesid_config
    compress(model, None)
    try:
        yield
    finally:
        compress(model, 1)
        model.config.prunesid_config, model.model._says_what_it_keeps = settings, False


def running(model: Any, case: Case) -> Any:
    """The context in which a model runs a case; it yields what measures its visual tokens, None for all of them."""
    method, budget = case
    if case == STOCK:
        return as_stock(model)
    return _off(model) if budget is None else applied(model, method, budget)


@contextmanager
def _off(model: Any) -> Iterator[None]:
    with applied(model, "full", 1.0):
        yield


def list_cases(model: Any, processor: Any, first: Row, methods: list[str] | None, budgets: list) -> list[Case]:
    """
    The stock class, ours switched off, and each method at each budget. By default the methods of `TRIED` that the
    model can run; a method that was asked for and does not run is an error.
    """
    for method in methods or ():
        if method not in METHODS or method == "full":
            known = ", ".join(name for name in METHODS if name != "full")
            raise ValueError(f"--methods must be among {known}, got {method!r}. Correct the name.")
    chosen = []
    for method in dict.fromkeys(methods or TRIED):
        try:
            answer(model, processor, (method, budgets[-1]), [request_of(first)], 1)
            chosen.append(method)
        except ValueError as error:
            if methods:
                raise
            print(f"{method} is left out: {error}", file=sys.stderr)
    return [STOCK, OFF, *((method, budget) for method in chosen for budget in budgets)]


def request_of(row: Row) -> Request:
    content = [{"type": "image", "image": open_image(row.source)}, {"type": "text", "text": row.question}]
    return Request(row.number, row.number, [{"role": "user", "content": content}])


def key_of(basis: str, case: Case, request: Request) -> str:
    """A hash of all that an answer depends on."""
    digest = hashlib.sha256(f"{basis}/{case}".encode())
    for part in request.messages[0]["content"]:
        image = part.get("image")
        digest.update(part["text"].encode() if image is None else f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:32]


def check_record(line: str) -> dict:
    record = json.loads(line)
    if not isinstance(record["key"], str) or not isinstance(record["answer"], str):
        raise ValueError("no key or no answer")
    return {**record, "tokens": float(record["tokens"])}


def collect(
    model: Any, processor: Any, cases: list[Case], rows: list[Row], path: Path, basis: str, length: int, at_once: int
) -> dict[Case, list[dict]]:
    """The record of each row in each case: `answer` and visual `tokens`. Those in `path` are not made again."""
    known = {record["key"]: record for _, record in read_lines(path, check_record)}
    found: dict[Case, list[dict]] = {case: [] for case in cases}
    with append_to(path) as lines, tqdm(total=len(rows) * len(cases), desc="rows x cases") as bar:
        for start in range(0, len(rows), at_once):
            requests = [request_of(row) for row in rows[start : start + at_once]]
            for case in cases:
                keys = [key_of(basis, case, request) for request in requests]
                left = [(key, request) for key, request in zip(keys, requests) if key not in known]
                if left:
                    told, tokens = answers_of(model, processor, case, [request for _, request in left], length)
                    for (key, request), text in zip(left, told):
                        known[key] = {"key": key, "row": request.row, "method": case[0], "budget": case[1]}
                        known[key] |= {"tokens": tokens, "answer": text}
                        lines.write(json.dumps(known[key]) + "\n")
                    lines.flush()
                found[case] += [known[key] for key in keys]
                bar.update(len(requests))
    return found


def answer(model: Any, processor: Any, case: Case, requests: list[Request], length: int) -> tuple[list[str], float]:
    """The greedy answers, and the visual tokens of all rows."""
    inputs = write_requests(processor, requests)
    if case == STOCK:
        inputs = without_ours(model, inputs)
    with running(model, case) as run:
        answers = answer_inputs(model, processor, inputs, length)
    token = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
    placeholders = float((inputs["input_ids"] == token).sum())
    return answers, sum(run.tokens) if run is not None and run.tokens else placeholders


def answers_of(
    model: Any, processor: Any, case: Case, requests: list[Request], length: int
) -> tuple[list[str], float]:
    """The greedy answers, and the mean number of visual tokens of a row."""
    try:
        answers, tokens = answer(model, processor, case, requests, length)
    except ValueError as error:
        numbers = ", ".join(str(request.row) for request in requests)
        raise ValueError(f"Row {numbers} with {case[0]}: {error}") from error
    return answers, tokens / len(requests)


def measure_cost(model: Any, processor: Any, cases: list[Case], rows: list[Row]) -> dict[Case, dict]:
    """Median time to the first token of a row, the cases interleaved, and the peak memory of one."""
    requests = [request_of(row) for row in rows[:TIMED_ROWS]]

    def first_token(case: Case, few: list[Request]) -> None:
        for request in few:
            answer(model, processor, case, [request], 1)

    seconds = seconds_interleaved({str(case): partial(first_token, case, requests) for case in cases}, ROUNDS)
    return {
        case: {
            "first_token_ms": round(1000 * statistics.median(seconds[str(case)]) / len(requests), 1),
            "peak_mib": round(peak_bytes(partial(first_token, case, requests[:1])) / 2**20, 1),
        }
        for case in cases
    }


# Counting


def summarise(found: dict[Case, list[dict]], rows: list[Row], contains: bool) -> list[dict]:
    """
    For each case `accuracy`, the `share_of_full` and the difference `to_full` to the model switched off, with 95%
    intervals of a bootstrap over images, paired: all cases see the same rows.
    """
    numbers = {source: number for number, source in enumerate(dict.fromkeys(row.source for row in rows))}
    image = np.array([numbers[row.source] for row in rows])
    weights = resample(len(numbers))

    def per_image(values: list[float]) -> np.ndarray:
        return np.bincount(image, values, len(numbers))

    asked = weights @ per_image([1.0] * len(rows))
    accuracy = {
        case: weights
        @ per_image([float(is_right(own["answer"], row, contains)) for own, row in zip(records, rows)])
        / asked
        for case, records in found.items()
    }
    return [
        {
            "method": case[0],
            "budget": case[1],
            "tokens": round(statistics.fmean(record["tokens"] for record in records), 1),
            "accuracy": interval(accuracy[case]),
            "share_of_full": interval(ratio(accuracy[case], accuracy[OFF])),
            "to_full": interval(accuracy[case] - accuracy[OFF]),
        }
        for case, records in found.items()
    ]


def is_level(row: dict) -> bool:
    """Whether no loss can be measured: the interval of the difference to the model switched off reaches 0."""
    return row["to_full"]["high"] >= 0


def conclusions(lines: list[dict], num_rows: int) -> list[str]:
    """What the table says: each method's smallest budget at which, as at all larger ones, nothing is lost."""
    said, methods = [], dict.fromkeys(line["method"] for line in lines if line["budget"] is not None)
    if not lines[1]["accuracy"]["value"]:
        return [
            "With all tokens no answer is right, so that nothing can be said of budgets. See the answers in "
            "answers.jsonl: perhaps --contains, or a question that asks for a single word."
        ]
    for method in methods:
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: -line["tokens"])
        free = next((number for number, line in enumerate(own) if not is_level(line)), len(own))
        if not free:
            lost, kept = -100 * own[0]["to_full"]["value"], own[0]["tokens"]
            said.append(f"{method}: every budget that was tried costs accuracy, {kept:.0f} tokens {lost:.1f} points.")
            continue
        best = own[free - 1]
        hidden = max(-best["to_full"]["low"], 0)
        said.append(
            f"{method}: nothing measurable is lost down to {best['tokens']:.0f} visual tokens (budget "
            f"{describe(best['budget'])}); a loss of up to {100 * hidden:.1f} points is not excluded."
        )
    if "random" in methods and all(is_level(line) for line in lines if line["method"] == "random"):
        said.append("random loses nothing measurable either: these rows do not tell good selection from bad.")
    if num_rows < MANY:
        said.append(f"{num_rows} rows are few. Some {MANY} or more make the intervals narrow enough to decide by.")
    return said


def describe(budget: int | float | None) -> str:
    return "" if budget is None else f"{budget:.3g}" if isinstance(budget, float) else str(budget)


def columns(line: dict) -> dict[str, str]:
    shown = {
        "method": line["method"],
        "budget": describe(line["budget"]),
        "tokens": f"{line['tokens']:.0f}",
        "accuracy": ranged(line["accuracy"]),
        "relative": percent(line["share_of_full"]["value"]),
        "points to off": ranged(line["to_full"]),
    }
    if "first_token_ms" in line:
        shown |= {"first token": f"{line['first_token_ms']:.0f} ms", "memory": f"{line['peak_mib']:.0f} MiB"}
    return shown


def evaluate_rows(arguments: argparse.Namespace, basis_of: Callable[[Any], str]) -> dict:
    """Answer, count, print and write `PAGE.md` and `PAGE.json`; returns what the last line says."""
    for name in ("batch_size", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}.")
    rows = read_rows(arguments.data)
    name = arguments.model
    if name is None:
        from prunesid_cli.embedded import complete

        name = str(complete())
    model, processor = load(name, None, None, "auto")
    processor.tokenizer.padding_side = "left"
    budgets = list(dict.fromkeys(arguments.budgets or SHARES))
    cases = list_cases(model, processor, rows[0], arguments.methods, budgets)
    arguments.out.mkdir(parents=True, exist_ok=True)
    basis = f"{basis_of(model)}/{arguments.max_new_tokens}"
    path = arguments.out / "answers.jsonl"
    found = collect(model, processor, cases, rows, path, basis, arguments.max_new_tokens, arguments.batch_size)
    lines = summarise(found, rows, arguments.contains)
    if not arguments.quick:
        costs = measure_cost(model, processor, cases, rows)
        for line, case in zip(lines, cases):
            line |= costs[case]
    said = conclusions(lines, len(rows))
    images = len({row.source for row in rows})
    head = (
        f"{len(rows)} questions about {images} images of {arguments.data}, {name}, {machine()}. Percent; 95% "
        "intervals of a paired bootstrap over images in brackets. `relative` is accuracy / accuracy switched off."
    )
    shown = [columns(line) for line in lines]
    print_rows(shown)
    print("\n" + "\n".join(said))
    title = f"# {arguments.page.replace('_', ' ').capitalize()} on your own rows"
    page = [title, "", head, "", *grid(shown), "", *(f"- {line}" for line in said)]
    (arguments.out / f"{arguments.page}.md").write_text("\n".join(page) + "\n")
    result = {"model": name, "machine": machine(), "rows": lines, "conclusions": said}
    (arguments.out / f"{arguments.page}.json").write_text(json.dumps(result, indent=2) + "\n")
    return {
        "rows": len(rows),
        "images": images,
        "page": str(arguments.out / f"{arguments.page}.md"),
        "conclusions": said,
    }
