"""`prunesid tune`: what is trained, what is labelled, that a killed run goes on, and what is saved."""

import json
import os
import re

import pytest
import torch
from families import every_row
from oracle_family import build as build_row
from PIL import Image
from tiny import BUDGET, IMAGE
from tiny_checkpoint import picture, save_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor
from prunesid_cli import tune
from prunesid_cli.command import build_parser
from prunesid_cli.picture_memo import remembered_pictures
from prunesid_cli.tune import Examples, Row, Tuner, between, choose_parameters, compare, read_rows, run, split_rows


peft_reads_old_names = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("tune") / "base")
    rows = []
    for seed in range(6):
        picture(seed).save(folder.parent / f"{seed}.png")
        rows += [{"image": f"{seed}.png", "question": f"word{10 + seed}", "answer": f"word{40 + seed % 2}"}] * 2
    (folder.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(base, output, *more):
    parser = build_parser("tune", tune)
    own = ["tune", str(base.parent / "rows.jsonl"), "--model", str(base), "--output", str(output)]
    fast = [
        "--batch-size",
        "4",
        "--max-steps",
        "4",
        "--save-steps",
        "2",
        "--warmup-steps",
        "0",
        "--budget",
        str(BUDGET),
    ]
    return parser.parse_args([*own, *fast, "--max-new-tokens", "2", *more])


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).state_dict()


# Rows


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_rows_of_each_kind(tmp_path, kind):
    first = {"image": "a.png", "question": "what, then?", "answer": 7}
    fields = [first, {"image": "http://x/b", "question": "q", "answer": "a b"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, fields)) + "\n\n")
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        lines = [mark.join(f'"{value}"' for value in row.values()) for row in fields]
        path.write_text(mark.join(fields[0]) + "\n" + "\n".join(lines) + "\n")
    assert read_rows(path) == [Row(str(tmp_path / "a.png"), "what, then?", "7"), Row("http://x/b", "q", "a b")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rows"),
        ("{", "Row 1 of .* is no JSON"),
        ("[1]", "Row 1 of .* must be a JSON object"),
        ('{"image": "a", "question": "q"}', "Row 1 of .* must have some text as its answer, got None"),
        ('{"image": "a", "question": " ", "answer": "b"}', "as its question"),
    ],
)
def test_bad_rows(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(path)
    with pytest.raises(ValueError, match="The rows must be a file"):
        read_rows(tmp_path / "rows.txt")


def test_no_picture_is_in_both_parts():
    rows = [Row(f"{number // 3}.png", str(number), "a") for number in range(30)]
    train, held = split_rows(rows, 0.3)
    assert len(held) == 9 and not {row.source for row in train} & {row.source for row in held}
    assert split_rows(rows, 0) == (rows, [])
    with pytest.raises(ValueError, match="--held-out must be a share"):
        split_rows(rows, 1.0)


def test_the_score_is_paired_over_pictures():
    rows = [Row(f"{number // 2}.png", "q", "yes") for number in range(8)]
    found = compare(rows, ["no"] * 8, ["Yes."] * 8)
    assert found == {"before": 0.0, "after": 100.0, "gain": {"value": 100.0, "low": 100.0, "high": 100.0}}


# What is trained and labelled


@every_row()
def test_every_family_has_parts_between_tower_and_language_model(name):
    ours, _, _ = build_row(name)
    found = between(ours)
    assert found and {own for own, _ in ours.named_parameters()}.issuperset(found)
    inside = r"model\.(language_model|(vision|visual)(_tower|_model)?(\..*)?\.(layers?|blocks?|embed\w*))\."
    assert not [own for own in found if re.match(inside, own)]


def test_labels_are_the_answer_and_its_end(base):
    processor = PruneSIDLlavaProcessor.from_pretrained(base, num_visual_tokens=BUDGET)
    examples = Examples(processor, [2])
    first = Row(str(base.parent / "0.png"), "word10 word11", "word40")
    rows = [first, Row(str(base.parent / "1.png"), "word9", "word41 word42")]
    batch = examples(rows)
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [BUDGET] * 2
    labelled = [ids[labels != -100].tolist() for ids, labels in zip(batch["input_ids"], batch["labels"])]
    assert labelled == [[40, 2], [41, 42, 2]]
    prompts = examples.prompts(rows)
    for ids, whole, answer in zip(prompts["input_ids"], batch["input_ids"], labelled):
        asked = ids[ids != 0].tolist()
        assert whole[whole != 0].tolist() == asked + answer


def test_what_is_chosen(base):
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base)
    chosen = choose_parameters(model, None)
    assert chosen == sorted(name for name, _ in model.named_parameters() if "multi_modal_projector" in name)
    assert [name for name, own in model.named_parameters() if own.requires_grad] != []
    assert choose_parameters(model, r"lm_head") == ["lm_head.weight"]
    with pytest.raises(ValueError, match="--train nothing finds nothing to train .* model.language_model"):
        choose_parameters(model, "nothing")


# Pictures that come again


@pytest.mark.parametrize("method", ["paper", "spread"])
def test_a_picture_runs_through_a_frozen_tower_once_and_is_encoded_as_it_is_alone(base, method):
    given = {"budget": BUDGET, "method": method}
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config=given).double()
    choose_parameters(model, None)
    processor = PruneSIDLlavaProcessor.from_pretrained(base)
    pixels = [processor.image_processor(picture(seed), return_tensors="pt")["pixel_values"] for seed in range(3)]
    pixels = torch.cat(pixels).double()

    def features(model, chosen, total):
        return model.get_image_features(pixel_values=pixels[chosen], num_visual_tokens=total)

    alone = {(seed, total): features(model, [seed], [total]) for seed in range(3) for total in (BUDGET, BUDGET + 3)}
    layer_runs: list = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: layer_runs.append(1))
    with remembered_pictures(model.model):
        with torch.inference_mode():
            features(model, [0], [BUDGET])
        for chosen, totals in (([0, 1, 0], [BUDGET] * 3), ([1, 0], [BUDGET] * 2), ([2, 1], [BUDGET, BUDGET + 3])):
            found = features(model, chosen, totals)
            for place, case in enumerate(zip(chosen, totals)):
                assert torch.equal(found.keep_indices[place], alone[case].keep_indices[0])
                assert torch.equal(found.pooler_output[place], alone[case].pooler_output[0])
            sum(own.sum() for own in found.pooler_output).backward()
        assert len(layer_runs) == 4
        gradients = [own.grad for own in model.model.multi_modal_projector.parameters()]
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
    features(model, [0], [BUDGET])
    assert len(layer_runs) == 5


@pytest.mark.parametrize("change", ["trained", "dropout", "whole", "dynamic", "cls"])
def test_nothing_is_remembered_where_a_picture_may_come_out_otherwise(base, change):
    given = {"budget": 10**6 if change == "whole" else BUDGET, "dynamic": change == "dynamic"}
    given["method"] = "release" if change == "cls" else "paper"
    if change == "dynamic":
        given["reference_information"] = 1.0
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config=given)
    choose_parameters(model, "vision_tower" if change == "trained" else None)
    if change == "dropout":
        model.config.vision_config.attention_dropout = 0.1
    layer_runs: list = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: layer_runs.append(1))
    pixels = torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2)
    with remembered_pictures(model.model):
        for _ in range(2):
            model.get_image_features(pixel_values=pixels)
    assert len(layer_runs) == 2


def test_no_more_is_remembered_than_the_limit(base):
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": BUDGET})
    choose_parameters(model, None)
    layer_runs: list = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: layer_runs.append(1))
    pixels = torch.rand(3, 3, *[model.config.vision_config.image_size] * 2)
    one = 4 * BUDGET * model.config.vision_config.hidden_size
    with remembered_pictures(model.model, limit=2 * one):
        for place in (0, 1, 1, 2, 2, 0):
            model.get_image_features(pixel_values=pixels[place : place + 1])
    assert len(layer_runs) == 4


# Runs


def test_it_trains_the_projector_alone_and_saves_a_variant(base, tmp_path):
    report = run(arguments(base, tmp_path / "out", "--held-out", "0.34", "--learning-rate", "0.01"))
    assert report["rows"] == 8 and report["held_out"] == 4 and report["steps"] == 4
    assert set(report["gain"]) == {"value", "low", "high"}
    assert not (tmp_path / "out.training").exists()
    before, after = weights(base), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    assert AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).num_visual_tokens == BUDGET
    assert (tmp_path / "out" / "modeling_prunesid_llava.py").exists() and (tmp_path / "out" / "README.md").exists()


@peft_reads_old_names
def test_lora_is_merged_into_the_language_model(base, tmp_path):
    pytest.importorskip("peft")
    run(arguments(base, tmp_path / "out", "--held-out", "0", "--lora", "2", "--learning-rate", "0.01"))
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed) and any("projector" in name for name in changed)
    assert not any("vision_tower" in name or "embed" in name for name in changed)


class Killed(Exception):
    pass


@peft_reads_old_names
@pytest.mark.parametrize("more", [(), pytest.param(("--lora", "2"), marks=pytest.mark.contract)])
def test_a_killed_run_goes_on_to_the_same_weights(base, tmp_path, monkeypatch, more):
    given = ("--held-out", "0.34", "--learning-rate", "0.01", *more)
    run(arguments(base, tmp_path / "whole", *given))
    step = Tuner.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "training_step", dies)
        with pytest.raises(Killed):
            run(arguments(base, tmp_path / "out", *given))
    assert sorted(os.listdir(tmp_path / "out.training/checkpoint-2")) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="was begun with learning_rate=0.01, and now it is 0.5"):
        run(arguments(base, tmp_path / "out", *given, "--learning-rate", "0.5"))
    seen: list = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Tuner, "training_step", lambda self, *args, **kwargs: seen.append(1) or step(self, *args, **kwargs)
        )
        report = run(arguments(base, tmp_path / "out", *given))
    assert len(seen) == 2 and report["steps"] == 4
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_bad_arguments_train_nothing(base, tmp_path):
    (tmp_path / "full").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "full" / "a.png")
    for output, more, message in (
        (tmp_path / "full", (), "--output must be a new or an empty folder"),
        (tmp_path / "out", ("--batch-size", "0"), "--batch-size must be at least 1"),
        (tmp_path / "out", ("--lora", "0"), "--lora must be a rank"),
        (tmp_path / "out", ("--method", "best"), "method must be one of"),
        (tmp_path / "out", ("--budget", "0"), "budget must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run(arguments(base, output, *more))
        assert not (tmp_path / "out").exists()
