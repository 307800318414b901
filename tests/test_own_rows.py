"""`prunesid evaluate --data`: rows of a file, answered by tiny models of two families, and what is said of them."""

import json
import random

import numpy as np
import pytest
import tiny_qwen
from tiny_checkpoint import picture, save_checkpoint
from transformers import BatchFeature

from modeling_prunesid import PruneSIDForImageTextToText
from prunesid_cli import command, own_rows
from prunesid_cli.own_rows import OFF, STOCK, Row, as_stock, conclusions, is_right, read_rows, summarise


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


def write(folder, lines, name="rows.csv"):
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit, match="2"):
        command.main(["evaluate", *map(str, arguments)])
    return capsys.readouterr().err.splitlines()[-1]


# Reading


def test_a_csv_a_tsv_and_a_jsonl_hold_the_same_rows(tmp_path):
    expected = [Row(1, str(tmp_path / "0.png"), "What, then?", ("two words", "1"))]
    write(tmp_path, ["Answer,image,Question,note", 'Two  words.|1,0.png,"What, then?",x'])
    assert read_rows(tmp_path) == read_rows(tmp_path / "rows.csv") == expected
    write(tmp_path, ["image\tquestion\tanswer", "0.png\tWhat, then?\tTwo words|1"], "rows.tsv")
    assert read_rows(tmp_path / "rows.tsv") == expected
    row = {"image": "0.png", "question": "What, then?", "answer": "two words|1"}
    write(tmp_path, [json.dumps(row), ""], "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == expected
    with pytest.raises(ValueError, match=r"--data must hold one file of rows .*got rows.csv, rows.jsonl, rows.tsv"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["picture,question,answer", "0.png,a,b"],
            "must have the columns image, question, answer, got picture, .*add im",
        ),
        (["image,question,answer"], "has no rows"),
        (["image,question,answer", "0.png,a"], "row 1: answer must be some text, got None"),
        (["image,question,answer", "0.png,,b"], "row 1: question must be some text, got ''"),
        (["image,question,answer", "0.png,a, . "], "row 1: answer must be some text, got ' . '"),
        (["image,question,answer", "0.png,a,b", "9.png,a,b"], "row 2: 9.png is not a readable image: .*No such file"),
        (["image,question,answer", "0.png,a,b", "rows.csv,a,b"], "row 2: rows.csv is not a readable image"),
        (["image,question,answer", *["9.png,a,b"] * 7], r"fix or remove them. row 1: .* row 5: .*\(and 2 more\)"),
    ],
)
def test_bad_rows_are_named_before_anything_is_loaded(tmp_path, capsys, lines, message):
    path = write(tmp_path, lines)
    with pytest.raises(ValueError, match=message):
        read_rows(path)
    assert "prunesid evaluate: " in refusal(capsys, "--out", tmp_path / "out", "--data", path, "--model", "none")
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named(tmp_path):
    for line, message in (("{", "Row 1 of .* is no JSON"), ("[1]", r"Row 1 of .* must be a JSON object, got '\[1\]'")):
        with pytest.raises(ValueError, match=message):
            read_rows(write(tmp_path, [line], "rows.jsonl"))
    (tmp_path / "latin.csv").write_bytes(b"image,question,answer\n0.png,caf\xe9,b\n")
    with pytest.raises(ValueError, match="must be text in UTF-8"):
        read_rows(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match="--data must be a folder or a file of rows"):
        read_rows(tmp_path / "rows.xlsx")


def test_answers_are_compared_by_their_words():
    row = Row(1, "", "", ("no", "two cats"))
    assert is_right("No.", row, False) and is_right(" two\n CATS", row, False) and not is_right("no cats", row, False)
    assert is_right("There are two cats there", row, True) and not is_right("I know it not", row, True)


# Answering


def test_as_stock_answers_as_the_stock_class_and_gives_the_model_back(base):
    model = PruneSIDForImageTextToText.from_pretrained(base, prunesid_config={"budget": 8})
    settings, own = model.config.prunesid_config, type(model)
    for _ in range(2):
        with as_stock(model):
            assert type(model).__name__ == "LlavaForConditionalGeneration"
            assert type(model.model).__name__ == "LlavaModel" and "prunesid_config" not in model.config.to_dict()
        assert type(model) is own and model.config.prunesid_config is settings


@pytest.fixture
def data(tmp_path):
    lines = [f"{seed % 3}.png,word{5 + seed},word{40 + seed}" for seed in range(6)]
    return write(tmp_path, ["image,question,answer", *lines])


def evaluate(capsys, out, data, *options):
    command.main(["evaluate", "--out", str(out), "--data", str(data), "--max-new-tokens", "3", *map(str, options)])
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said


def records(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_all_cases_answer_and_a_stopped_run_goes_on(base, data, tmp_path, capsys, monkeypatch):
    options = ("--model", base, "--budgets", "8", "0.5", "--methods", "prunesid-spread", "fastv")
    line, said = evaluate(capsys, tmp_path / "out", data, *options)
    assert line["rows"] == 6 and line["images"] == 3 and "no answer is right" in line["conclusions"][0]
    result = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    cases = [(row["method"], row["budget"]) for row in result["rows"]]
    assert cases == [
        ("stock", None), ("off", None), ("prunesid-spread", 8), ("prunesid-spread", 0.5), ("fastv", 8), ("fastv", 0.5),
    ]  # fmt: skip
    tokens = [row["tokens"] for row in result["rows"]]
    assert tokens[:4] == [49, 49, 8, 25] and 8 <= tokens[4] < 49
    assert all(row["first_token_ms"] > 0 and row["peak_mib"] > 0 for row in result["rows"])
    page = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| prunesid-spread | 0.5 | 25 |" in page and "prunesid-spread" in said.out
    found = records(tmp_path / "out")
    assert len(found) == 36
    answers = {name: [own["answer"] for own in found if own["method"] == name] for name in ("stock", "off")}
    assert answers["stock"] == answers["off"] and len(set(answers["off"])) > 1

    path = tmp_path / "out" / "answers.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]) + '{"key": "ab')
    asked, answer = [], own_rows.answers_of
    monkeypatch.setattr(own_rows, "answers_of", lambda *given: asked.extend(given[3]) or answer(*given))
    again, _ = evaluate(capsys, tmp_path / "out", data, *options, "--quick", "--batch-size", "4")
    assert len(asked) == 26 and again["rows"] == 6
    new = json.loads((tmp_path / "out" / "accuracy.json").read_text())["rows"]
    same = ("method", "budget", "tokens", "accuracy", "to_full")
    assert [{name: row[name] for name in same} for row in new] == [
        {name: row[name] for name in same} for row in result["rows"]
    ]


def test_answers_that_are_right_are_counted(base, data, tmp_path, capsys):
    options = ("--model", base, "--budgets", "8", "--methods", "random", "--quick")
    evaluate(capsys, tmp_path / "out", data, *options)
    told = [own["answer"] for own in records(tmp_path / "out") if own["method"] == "off"]
    lines = [f'{seed % 3}.png,word{5 + seed},"{told[seed] if seed % 2 else "never"}"' for seed in range(6)]
    write(tmp_path, ["image,question,answer", *lines])
    evaluate(capsys, tmp_path / "out", data, *options)
    stock, off, kept = json.loads((tmp_path / "out" / "accuracy.json").read_text())["rows"]
    assert stock["accuracy"]["value"] == off["accuracy"]["value"] == 0.5 and off["share_of_full"]["value"] == 1
    assert kept["to_full"]["value"] == pytest.approx(kept["accuracy"]["value"] - 0.5, abs=1e-4)


def test_without_methods_those_that_the_model_can_run_are_tried(data, tmp_path, capsys, monkeypatch):
    """Qwen2.5-VL's tower has no CLS token: `spread` is left out, with its reason, unless asked for."""
    model = tiny_qwen.build("Qwen2_5_VL", budget=None)

    class Processor:
        tokenizer = type("Tokenizer", (), {})()

        def batch_decode(self, answers, skip_special_tokens):
            return [str(row.tolist()) for row in answers]

    def write_requests(processor, requests):
        inputs = tiny_qwen.batch(
            "Qwen2_5_VL",
            *(
                tiny_qwen.prompt("Qwen2_5_VL", 7 + request.row, ("image", (1, 8, 8 + 4 * (request.row % 2))), 8)
                for request in requests
            ),
        )
        return BatchFeature(inputs)

    monkeypatch.setattr(own_rows, "load", lambda *given: (model, Processor()))
    monkeypatch.setattr(own_rows, "write_requests", write_requests)
    options = ("--model", "tiny", "--quick", "--budgets", "0.5", "0.25")
    _, said = evaluate(capsys, tmp_path / "out", data, *options)
    assert "prunesid-spread is left out: " in said.err and "CLS" in said.err
    rows = json.loads((tmp_path / "out" / "accuracy.json").read_text())["rows"]
    assert [row["method"] for row in rows[2::2]] == ["prunesid-paper", "prunesid-auto", "random"]
    assert [row["tokens"] for row in rows[:4]] == [20, 20, 10, 5]
    with pytest.raises(SystemExit):
        evaluate(capsys, tmp_path / "out", data, *options, "--methods", "prunesid-spread")


def test_options_of_the_scenes_and_wrong_values_are_refused(base, data, tmp_path, capsys):
    given = ("--out", tmp_path / "out", "--data", data, "--model", base)
    assert "--scenes is of the scenes, and --data asks rows" in refusal(capsys, *given, "--scenes", 3)
    assert "--batch-size must be at least 1, got 0" in refusal(capsys, *given, "--batch-size", 0)
    assert "got 'sid'. Correct the name" in refusal(capsys, *given, "--methods", "sid")


# Counting


def test_statistics_agree_with_images_drawn_one_by_one():
    rng = random.Random(0)
    rows = [Row(n, f"{n % 7}.png", "", ("yes",)) for n in range(30)]
    cases = [STOCK, OFF, ("a", 8), ("b", 8)]
    found = {case: [{"answer": rng.choice(("yes", "no")), "tokens": 8.0} for _ in rows] for case in cases}
    lines = dict(zip(cases, summarise(found, rows, False)))
    draws = own_rows.resample(7)[1:].astype(int)
    for case in cases:
        differences = []
        for times in draws:
            hits = [(found[case][i]["answer"] == "yes") - (found[OFF][i]["answer"] == "yes") for i in range(30)]
            count = sum(times[i % 7] for i in range(30))
            differences.append(sum(times[i % 7] * hits[i] for i in range(30)) / count)
        low, high = np.percentile(differences, (2.5, 97.5))
        assert lines[case]["to_full"]["low"] == pytest.approx(low, abs=1e-4)
        assert lines[case]["to_full"]["high"] == pytest.approx(high, abs=1e-4)
    share = sum(own["answer"] == "yes" for own in found["a", 8]) / 30
    assert lines["a", 8]["accuracy"]["value"] == pytest.approx(share, abs=1e-4)


def line(method, budget, high, low=-0.1, accuracy=0.8):
    levels = {"value": accuracy, "low": accuracy, "high": accuracy}
    to_full = {"value": (low + high) / 2, "low": low, "high": high}
    return {"method": method, "budget": budget, "tokens": budget or 49, "accuracy": levels, "to_full": to_full}


def test_the_smallest_budget_that_costs_nothing_counts_from_above():
    lines = [line("stock", None, 0.0), line("off", None, 0.0)]
    lines += [line("a", 16, 0.01), line("a", 64, -0.01), line("a", 128, 0.02, -0.034), line("b", 64, -0.01)]
    said = conclusions(lines, 400)
    assert said == [
        "a: nothing measurable is lost down to 128 visual tokens (budget 128); a loss of up to 3.4 points is not "
        "excluded.",
        "b: every budget that was tried costs accuracy, 64 tokens 5.5 points.",
    ]
    assert "few" in conclusions(lines, 40)[-1]
    lines = [line("stock", None, 0.0), line("off", None, 0.0), line("random", 8, 0.0)]
    assert "do not tell good selection from bad" in conclusions(lines, 400)[-1]
    lines = [line("stock", None, 0.0), line("off", None, 0.0, accuracy=0.0), line("a", 8, 0.0)]
    assert "no answer is right" in conclusions(lines, 400)[0]
