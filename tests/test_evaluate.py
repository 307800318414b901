"""The evaluation: its statistics against naive computations, and its answers against plain `generate`."""

import copy
import importlib
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, TEXT, VISION
from transformers import CLIPImageProcessorPil, LlavaProcessor

from modeling_prunesid import PruneSIDLlavaConfig, PruneSIDLlavaForConditionalGeneration
from prunesid_cli import command


KINDS = ("presence", "count", "where", "colour", "reading", "region")


@pytest.fixture(scope="module")
def modules():
    scripts = str(Path(__file__).parents[1] / "scripts")
    sys.path.insert(0, scripts)
    names = ("evaluate", "answer_statistics", "tower_memo", "scenes", "evaluation_pages")
    yield {
        **{name: importlib.import_module(f"prunesid_cli.{name}") for name in names},
        **{name: importlib.import_module(name) for name in ("train_demo", "ceiling")},
    }
    sys.path.remove(scripts)


@pytest.fixture
def evaluate(modules):
    return modules["evaluate"]


@pytest.fixture
def naive(modules):
    return modules["answer_statistics"]


@pytest.fixture
def loaded(modules):
    """A tiny random model that speaks the scenes' words, and its processor."""
    tokenizer = modules["train_demo"].build_tokenizer()
    config = PruneSIDLlavaConfig(
        vision_config=VISION,
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.image_token_id,
        image_seq_length=NUM_PATCHES,
        prunesid_config={"budget": None},
    )
    torch.manual_seed(0)
    model = PruneSIDLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
        model.lm_head.weight[:5] = 0  # special tokens
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    template = modules["train_demo"].CHAT_TEMPLATE
    processor = LlavaProcessor(
        images, tokenizer, patch_size=PATCH_SIZE, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    return model, processor


def question(modules, kind, text, answer, words=("", "")):
    return modules["scenes"].Question(kind, text, answer, words)


# Statistics


def test_f1_is_that_of_precision_and_recall(naive):
    rng = random.Random(0)
    for _ in range(50):
        answers, truths = ([rng.choice(("yes", "no", "car")) for _ in range(12)] for _ in range(2))
        both = sum(a == "yes" and t == "yes" for a, t in zip(answers, truths))
        if not both:
            assert naive.f1(answers, truths) == 0
            continue
        precision, recall = both / answers.count("yes"), both / truths.count("yes")
        assert naive.f1(answers, truths) == pytest.approx(2 * precision * recall / (precision + recall))


def test_prior_is_the_most_frequent_answer_to_the_wording_then_to_the_template(modules, naive):
    def where(noun, place):
        return question(modules, "where", f"where is the {noun}?", place, ("where", noun))

    seen = [where("cat", "top left")] * 30 + [where("dog", "bottom right")] * 20 + [where("key", "bottom right")]
    guess = naive.fit_prior(seen)
    assert guess(where("cat", "")) == "top left"
    assert guess(where("dog", "")) == "bottom right"
    assert guess(where("key", "")) == "top left"  # 10 x 30/51 outweighs a single key and 10 x 21/51
    assert guess(where("car", "")) == "top left"
    assert guess(question(modules, "count", "count the cat.", "2", ("count", "cat"))) == ""


def found_at_random(modules, rng, num_scenes=9):
    """What `collect` returns for three methods, whose answers are right by chance."""
    found = {"questions": [], "scenes": [], "variants": [], "answers": {}, "tokens": {}}
    for scene in range(num_scenes):
        found["variants"].append(("salient", "context")[scene % 2])
        for kind in rng.sample(KINDS, 4) + ["presence"]:
            found["questions"].append(question(modules, kind, "", rng.choice(("yes", "no"))))
            found["scenes"].append(scene)
    for case, skill in ((("full", 49), 0.9), (("good", 8), 0.8), (("bad", 8), 0.4)):
        found["answers"][case] = [q.answer if rng.random() < skill else "?" for q in found["questions"]]
        found["tokens"][case] = float(case[1])
    return found


def naive_accuracy(found, answers, scenes):
    """Mean accuracy of each kind over the questions of `scenes`, a scene counted as often as it is listed."""
    accuracy = {}
    for kind in KINDS:
        hits = [
            answer == q.answer
            for drawn in scenes
            for q, scene, answer in zip(found["questions"], found["scenes"], answers)
            if scene == drawn and q.kind == kind
        ]
        if hits:
            accuracy[kind] = sum(hits) / len(hits)
    return accuracy


def test_bootstrap_agrees_with_drawn_scenes_counted_one_by_one(modules, naive):
    for seed in range(3):
        found = found_at_random(modules, random.Random(seed))
        result = naive.summarise(found, lambda _: "yes")
        assert [row["method"] for row in result["rows"]] == ["full", "good", "bad"]
        draws = naive.resample(len(found["variants"]))
        assert (draws.sum(1) == len(found["variants"])).all() and (draws[0] == 1).all()
        shares, above = {"good": [], "bad": []}, []
        for row in draws[:200].astype(int):
            scenes = [scene for scene, times in enumerate(row) for _ in range(times)]
            full = naive_accuracy(found, found["answers"]["full", 49], scenes)
            prior = naive_accuracy(found, ["yes"] * len(found["questions"]), scenes)
            for method in shares:
                seen = naive_accuracy(found, found["answers"][method, 8], scenes)
                shares[method].append(sum(seen.values()) / sum(full.values()))
            gained = [sum(values[kind] - prior[kind] for kind in full) for values in (seen, full)]
            above.append(gained[0] / gained[1] if gained[1] else math.nan)

        rows = {row["method"]: row for row in result["rows"]}

        kinds = np.array([KINDS.index(q.kind) for q in found["questions"]])
        scenes = np.array(found["scenes"])
        hits = {
            case: naive.tally(np.array([a == q.answer for a, q in zip(answers, found["questions"])]), scenes, kinds, 6)
            for case, answers in found["answers"].items()
        }
        asked = naive.tally(np.ones(len(kinds)), scenes, kinds, 6)
        accuracy = {case: naive.ratio(draws @ values, draws @ asked) for case, values in hits.items()}
        for method, values in shares.items():
            assert rows[method]["share_of_full"]["value"] == pytest.approx(values[0], abs=1e-4)
            for number, kind in enumerate(KINDS):
                drawn = accuracy[method, 8][1:, number] - accuracy["full", 49][1:, number]
                low, high = np.nanpercentile(drawn, (2.5, 97.5))
                of_kind = rows[method]["to_full_by_type"][kind]
                assert (of_kind["low"], of_kind["high"]) == pytest.approx((low, high), abs=1e-4)
        assert rows["bad"]["share_above_prior"]["value"] == pytest.approx(above[0], abs=1e-4)
        best = max(shares, key=lambda method: shares[method][0])
        for method in shares:
            expected = shares[method][0] - shares[best][0]
            assert rows[method]["behind_best"]["value"] == pytest.approx(expected, abs=1e-4)
        full = naive_accuracy(found, found["answers"]["full", 49], range(len(found["variants"])))
        assert {kind: value for kind, value in result["by_type"].items() if value is not None} == pytest.approx(
            full, abs=1e-4
        )
        assert result["full_accuracy"] == pytest.approx(sum(full.values()) / len(full), abs=1e-4)

        for method, values in shares.items():
            drawn = naive.share_of_full(accuracy[method, 8], accuracy["full", 49])
            assert drawn[:200] == pytest.approx(np.array(values))
            low, high = np.percentile(drawn[1:], (2.5, 97.5))
            assert rows[method]["share_of_full"]["low"] == pytest.approx(low, abs=1e-4)
            assert rows[method]["share_of_full"]["high"] == pytest.approx(high, abs=1e-4)


def test_the_best_of_a_budget_keeps_to_it_overall_and_in_each_variant(modules, naive):
    for seed in range(20):
        found = found_at_random(modules, random.Random(seed))
        found["answers"]["fat", 8] = [question.answer for question in found["questions"]]
        found["tokens"]["fat", 8] = 8.6
        rows = {row["method"]: row for row in naive.summarise(found, lambda _: "yes")["rows"]}
        assert [rows[name]["is_within_budget"] for name in ("full", "good", "bad", "fat")] == [True, True, True, False]
        for scenes in ("all", "salient", "context"):
            of = modules["evaluation_pages"]._of
            shares = {name: of(rows[name], "share", scenes)["value"] for name in ("good", "bad", "fat")}
            for name, share in shares.items():
                behind = of(rows[name], "behind_best", scenes)
                assert behind["value"] == pytest.approx(share - max(shares["good"], shares["bad"]), abs=2e-4)
                assert behind["low"] <= behind["high"]


def test_winners_are_listed_with_those_that_equal_them(modules):
    def row(method, share, high, is_within=True):
        interval = {"value": share, "low": share, "high": share}
        behind = {"value": share - 0.9, "low": share - 0.95, "high": high}
        variants = {variant: {"value": None, "low": None, "high": None} for variant in ("salient", "context")}
        return {
            "method": method, "budget": 8, "is_within_budget": is_within, "share_of_full": interval,
            "share_by_variant": variants, "behind_best": behind, "behind_best_by_variant": variants,
        }  # fmt: skip

    rows = [row("a", 0.7, -0.1), row("b", 0.9, 0.0), row("c", 0.8, 0.0), row("d", 1.0, 0.2, is_within=False)]
    lines = modules["evaluation_pages"].winners(rows)
    assert len(lines) == 1
    assert list(lines[0].values()) == ["8", "all", "b", "90.0 (90.0 to 90.0)", "c (-10.0 (-15.0 to 0.0))"]


def test_answers_are_compared_in_any_case_and_without_a_full_stop(modules, naive):
    rng = random.Random(0)
    found = found_at_random(modules, rng)
    expected = naive.summarise(found, lambda _: "yes")
    for case, answers in found["answers"].items():
        found["answers"][case] = [rng.choice((a.upper(), a.title() + ".", a)) for a in answers]
    assert naive.summarise(found, lambda _: "Yes.") == expected


def test_hard_questions_are_those_that_the_smaller_picture_loses(modules, naive):
    found = found_at_random(modules, random.Random(0))
    assert all(row["hard"] is None for row in naive.summarise(found, lambda _: "yes")["rows"])
    found["answers"]["downsample-image", 8] = found["answers"].pop(("bad", 8))
    found["tokens"]["downsample-image", 8] = found["tokens"].pop(("bad", 8))
    result = naive.summarise(found, lambda _: "yes")
    full, small = found["answers"]["full", 49], found["answers"]["downsample-image", 8]
    hard = [i for i, q in enumerate(found["questions"]) if full[i] == q.answer != small[i]]
    good = found["answers"]["good", 8]
    share = sum(good[i] == found["questions"][i].answer for i in hard) / len(hard)
    rows = {row["method"]: row["hard"] for row in result["rows"]}
    assert result["hard_questions"] == {"8": len(hard)}
    assert rows["full"] is None
    assert rows["downsample-image"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (
        rows["good"]["value"] == pytest.approx(share, abs=1e-4) and rows["good"]["low"] < share < rows["good"]["high"]
    )


def test_the_page_has_a_column_of_hard_questions_and_says_what_it_is(run, tmp_path):
    options = ("--quick", "--budgets", "8")
    run(tmp_path, *options, "--methods", "random")
    assert "hard" not in (tmp_path / "accuracy.md").read_text()
    run(tmp_path, *options, "--methods", "random", "downsample-image", "cdpruner")
    page, result = (tmp_path / "accuracy.md").read_text(), json.loads((tmp_path / "accuracy.json").read_text())
    assert " | hard | " in page and f"of the same budget: {result['hard_questions']['8']} at 8 tokens." in page


def test_what_full_never_gets_right_has_no_share(modules, naive):
    found = found_at_random(modules, random.Random(0))
    found["answers"]["full", 49] = ["?"] * len(found["questions"])
    rows = naive.summarise(found, lambda _: "yes")["rows"]
    assert all(row["share_of_full"] == {"value": None, "low": None, "high": None} for row in rows)


# Answers


def test_questions_take_a_type_before_they_repeat_one(modules, evaluate):
    for number in range(6):
        scene = evaluate.scene_of("val", number)
        asked = modules["scenes"].ask(scene)
        chosen = evaluate.choose_questions(scene, 5)
        assert len(chosen) == 5 and all(q in asked for q in chosen)
        assert len({q.kind for q in chosen}) == min(5, len({q.kind for q in asked}))
        assert chosen == evaluate.choose_questions(scene, 5)


@pytest.mark.parametrize(
    "method",
    [
        "full",
        "prunesid-paper",
        "prunesid-release",
        "prunesid-dyn",
        "random",
        "visionzip",
        "fastv",
        "mustdrop",
        "vitcop",
        "cdpruner",
        "downsample-image",
    ],
)
def test_answers_are_those_of_plain_generate(modules, evaluate, loaded, method):
    model, processor = loaded
    model.config.prunesid_config.reference_information = 0.9
    scenes = [evaluate.scene_of("val", number) for number in range(3)]
    chunk = evaluate.build_chunk(processor, "cpu", 0, scenes, 3)
    with modules["tower_memo"].remembered(model.model.vision_tower):
        for other in ("prunesid-paper", "prunesid-release"):  # fill the memo in both ways
            with evaluate.applied(model, other, 8):
                evaluate.answer(model, processor, chunk)
        with evaluate.applied(model, method, 8) as run:
            answers = evaluate.answer(model, processor, chunk, evaluate.METHODS[method].reads_question)
    plain = []
    with evaluate.applied(model, method, 8) as alone:
        for row, asked in zip(chunk.rows, chunk.questions):
            text = evaluate.write_prompt(processor, asked)
            inputs = processor(images=scenes[row].image, text=text, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=evaluate.LONGEST_ANSWER, do_sample=False)
            words = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            plain.append(words.strip())
    assert answers == plain and len(set(answers)) > 1
    assert run.measured_tokens == pytest.approx(alone.measured_tokens)


def test_the_memo_runs_a_layer_again_for_other_pictures_or_a_watcher_alone(modules, loaded):
    tower = loaded[0].model.vision_tower
    runs = []
    block = tower.encoder.layers[1]
    forward = block.mlp.fc1.forward
    block.mlp.fc1.forward = lambda values: runs.append(1) or forward(values)
    pictures = [torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    with torch.no_grad():
        expected = [tower(picture).last_hidden_state for picture in pictures]
        runs.clear()
        with modules["tower_memo"].remembered(tower):
            for which, count in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 2)):
                assert torch.equal(tower(pictures[which].clone()).last_hidden_state, expected[which])
                assert len(runs) == count
            handle = block.self_attn.q_proj.register_forward_hook(lambda *_: None)
            tower(pictures[0])
            assert len(runs) == 3
            handle.remove()
        tower(pictures[0])
        assert len(runs) == 4


# The whole script


@pytest.fixture
def run(modules, evaluate, loaded, monkeypatch, capsys):
    """Runs `main` on the tiny model; returns the last line of what it prints."""
    monkeypatch.setattr(evaluate, "PRIOR_SCENES", 4)
    monkeypatch.setattr(evaluate, "ROUNDS", 1)
    monkeypatch.setattr(evaluate, "AT_ONCE", 2)
    monkeypatch.setattr(evaluate, "load_model", lambda folder: copy.deepcopy(loaded))

    def main(out, *options):
        command.main(["evaluate", "--out", str(out), "--scenes", "3", "--questions", "2", *options])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return main


def records(path):
    """Those of the file's lines that are whole."""
    lines = (path / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_stopped_run_goes_on_to_the_same_records(run, evaluate, tmp_path, monkeypatch):
    options = ("--quick", "--methods", "prunesid-dyn", "random", "--budgets", "8", "4")
    line = run(tmp_path / "whole", *options)
    whole = records(tmp_path / "whole")
    assert len(whole) == 2 * (1 + 2 * 2)
    (tmp_path / "stopped").mkdir()
    kept = [json.dumps(record) + "\n" for record in whole[:4]]
    written = "".join(kept) + '{"key": "ab'
    (tmp_path / "stopped" / "answers.jsonl").write_text(written)
    answered = []
    answer = evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *given: answered.append(1) or answer(*given))
    assert run(tmp_path / "stopped", *options) == line
    assert records(tmp_path / "stopped") == whole and len(answered) == len(whole) - 4
    assert (tmp_path / "stopped" / "answers.jsonl").read_text().startswith(written + "\n")  # appended to alone
    written = (tmp_path / "stopped" / "answers.jsonl").stat().st_mtime_ns
    assert run(tmp_path / "stopped", *options) == line and len(answered) == len(whole) - 4
    assert (tmp_path / "stopped" / "answers.jsonl").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "broken",
    [
        b'{"key": "ab{"key": "cd", "answers": [], "tokens": 8}', b"", b"null", b"5", b"[1]", b"\xff\xfe", bytes(30),
        b'{"key": 5, "answers": [], "tokens": 8}', b'{"key": "ab", "tokens": 8}', b'{"key": "ab", "answers": [null]}',
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_broken_line_is_skipped_and_named(evaluate, tmp_path, capsys, broken):
    path = tmp_path / "answers.jsonl"
    record = {"key": "k", "method": "full", "budget": 49, "chunk": 0, "tokens": 49, "answers": ["yes"]}
    lines = json.dumps(record).encode() + b"\n" + broken + b"\n" + json.dumps({**record, "key": "l"}).encode()
    path.write_bytes(lines)
    known = evaluate.Answers(path, "basis", None)
    assert set(known.records) == {"k", "l"}
    assert f"{path} line 2 is no record and is skipped: " in capsys.readouterr().err
    known.add({**record, "key": "m"})
    assert path.read_bytes() == lines + b"\n" + json.dumps({**record, "key": "m"}).encode() + b"\n"
    assert set(evaluate.Answers(path, "basis", None).records) == {"k", "l", "m"}


def test_dynamic_answers_belong_to_their_calibration(run, tmp_path, evaluate, monkeypatch):
    options = ("--quick", "--methods", "prunesid-dyn", "random", "--budgets", "8")
    run(tmp_path, *options)
    result = json.loads((tmp_path / "accuracy.json").read_text())
    reference = result["reference_information"]
    assert f"information score of these scenes, {reference:.4f}." in (tmp_path / "accuracy.md").read_text()
    [row] = [row for row in result["rows"] if row["method"] == "prunesid-dyn"]
    assert abs(row["tokens"] - 8) < 0.5  # each picture's count is rounded
    before = len(records(tmp_path))
    monkeypatch.setattr(evaluate, "reference_information", lambda *_: 2 * reference)
    run(tmp_path, *options)
    added = records(tmp_path)[before:]
    assert [(record["method"], record["chunk"]) for record in added] == [("prunesid-dyn", 0), ("prunesid-dyn", 1)]
    assert all(record["tokens"] < 8 for record in added)


def test_the_last_line_and_the_pages(run, evaluate, tmp_path, monkeypatch):
    answer = evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *given: answer(*given) and [q.answer for q in given[2].questions])
    line = run(tmp_path, "--methods", "prunesid-paper", "random", "--budgets", "8", "4")
    assert set(line) == {"full_accuracy", "by_type", "prior", "prior_by_type", "share_of_full"}
    assert set(line["by_type"]) == set(KINDS)
    assert {method: set(shares) for method, shares in line["share_of_full"].items()} == {
        "prunesid-paper": {"8", "4"},
        "random": {"8", "4"},
    }
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert [(row["method"], row["budget"], row["tokens"]) for row in result["rows"]] == [
        ("full", 49, 49), ("prunesid-paper", 8, 8), ("prunesid-paper", 4, 4), ("random", 8, 8), ("random", 4, 4),
    ]  # fmt: skip
    assert all(row["first_token_ms"] > 0 and row["peak_mib"] > 0 for row in result["rows"])
    page = (tmp_path / "accuracy.md").read_text()
    assert all(
        f"| {method} | encoder | {budget} |" in page for method in ("prunesid-paper", "random") for budget in (8, 4)
    )
    assert "| 8 | context | prunesid-paper | 100.0 (100.0 to 100.0) | random (0.0 (0.0 to 0.0)) |" in page
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_the_hash_of_answers_covers_all_code_they_depend_on(evaluate):
    """All that the hashed files import is hashed, but publishing, and processors: inputs are hashed themselves."""
    root = Path(evaluate.__file__).parents[1]
    matched = {pattern: list(root.glob(pattern)) for pattern in evaluate.METHOD_CODE}
    assert all(matched.values())
    code = {path.stem: path.read_text() for paths in matched.values() for path in paths}
    from_package = re.compile(r"^\s*from (?:modeling_prunesid)?\.(\w+) import", re.MULTILINE)
    imported = {name for text in code.values() for name in from_package.findall(text)}
    assert imported - set(code) == {"hub", "processing", "thin"}
    assert {"evaluate", "tower_memo", "ablations", "visionzip"} <= set(code)


def test_all_runs_every_method(run, evaluate, tmp_path):
    line = run(tmp_path, "--all", "--quick", "--budgets", "24")
    assert set(line["share_of_full"]) == set(evaluate.METHODS) - {"full"}
    places = {row["method"]: row["place"] for row in json.loads((tmp_path / "accuracy.json").read_text())["rows"]}
    assert {places[name] for name in ("fastv", "dart", "sparsevlm-v1.5")} == {"llm"}
    assert {places[name] for name in ("mustdrop", "vitcop", "prunesid-llm")} == {"both"}


def test_ablations_change_one_setting_at_a_time(run, evaluate, modules, tmp_path):
    line = run(tmp_path, "--quick", "--ablations", "--budgets", "8")
    names = set(line["share_of_full"])
    assert {"prunesid-paper", "grouping kmeans", "K = 16", "layer 0", "score cls_attention", "lambda auto"} <= names
    assert {row["tokens"] for row in json.loads((tmp_path / "accuracy.json").read_text())["rows"]} == {49, 8}


def test_wrong_names_are_refused(evaluate):
    with pytest.raises(ValueError, match="--methods must be among full, .*, got 'prunesid'. Correct the name."):
        evaluate.list_cases(["prunesid"], [8], 49)
    for budget in (0, 49):
        with pytest.raises(ValueError, match=f"--budgets must be between 1 and 48 tokens, got {budget}. Ask for"):
            evaluate.list_cases(["full"], [budget], 49)
    with pytest.raises(ValueError, match="--methods must name one besides full, got full. Add what"):
        evaluate.list_cases(["full"], [8], 49)


def test_wrong_counts_end_the_command(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--quick", "--questions", "0")
    assert "--questions must be at least 1, got 0" in capsys.readouterr().err


def test_a_page_has_the_name_and_title_asked_for(run, tmp_path, capsys):
    options = ("--quick", "--methods", "random", "--budgets", "8")
    run(tmp_path, *options, "--page", "accuracy_of_chance")
    page = (tmp_path / "accuracy_of_chance.md").read_text()
    assert page.startswith("# Accuracy of chance at every budget\n") and "](accuracy_of_chance.png)" in page
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"answers.jsonl", *(f"accuracy_of_chance.{end}" for end in ("md", "json", "png"))}
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *options, "--page", "a/b")
    assert "--page must be a name such as accuracy, got 'a/b'" in capsys.readouterr().err


# The ceiling


@pytest.mark.parametrize("number", range(6))
def test_the_knowing_selector_begins_with_what_is_drawn(modules, evaluate, number):
    scene = evaluate.scene_of("test", number)
    order = modules["ceiling"].ranked(scene)
    assert sorted(order) == list(range(576)) and order == modules["ceiling"].ranked(scene)
    boxes = [item.box for item in scene.texts + scene.objects]
    boxes += [band.box for band, _ in scene.bands]

    def meets(patch, box):
        top, left = divmod(patch, 24)
        return box[0] < 14 * left + 14 and 14 * left < box[2] and box[1] < 14 * top + 14 and 14 * top < box[3]

    first = order[: 4 * len(scene.texts) + len(scene.objects) + len(scene.bands)]
    assert all(any(meets(patch, box) for patch in first) for box in boxes)
    drawn = [place for place, patch in enumerate(order) if any(meets(patch, box) for box in boxes)]
    background = [place for place, patch in enumerate(order) if not any(meets(patch, box) for box in boxes)]
    assert np.mean(drawn) < np.mean(background)


def test_the_ceiling_of_a_tiny_model(modules, loaded, monkeypatch, capsys):
    ceiling = modules["ceiling"]
    monkeypatch.setattr(ceiling, "load_model", lambda folder: loaded)
    monkeypatch.setattr(ceiling, "ranked", lambda scene: list(range(NUM_PATCHES)))
    monkeypatch.setattr(ceiling, "BUDGETS", (8, 4))
    ceiling.main(["--scenes", "3", "--questions", "2"])
    shares = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(shares) == [str(NUM_PATCHES), "8", "4"] and shares[str(NUM_PATCHES)] in (1.0, None)
    with pytest.raises(ValueError, match="--scenes must be at least 1, got 0"):
        ceiling.main(["--scenes", "0"])
