"""Training of the demo's model: what its patches are told, and questions packed into one sequence."""

import copy
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def modules():
    scripts = str(Path(__file__).parents[1] / "scripts")
    sys.path.insert(0, scripts)
    yield importlib.import_module("train_demo"), importlib.import_module("prunesid_cli.scenes")
    sys.path.remove(scripts)


@pytest.fixture(scope="module")
def scene(modules):
    """A scene of known contents: a red car, a cat, a word and a floor of blue brick."""
    train, scenes = modules
    return scenes.Scene(
        "context", "train", 0, train.NO_PICTURE,
        [scenes.Item("car", (28, 14, 70, 56), "red"), scenes.Item("cat", (200, 200, 242, 242))],
        [scenes.Item("exit", (140, 28, 238, 56))],
        [(scenes.Item("floor", (0, 252, 336, 336), "blue"), "brick")],
    )  # fmt: skip


def test_every_word_of_questions_and_answers_has_a_token(modules, scene):
    train, scenes = modules
    tokenizer = train.build_tokenizer()
    for question in scenes.ask(scene):
        for seed in range(6):
            text = train.PROMPT.format(scenes.rephrase(question, random.Random(seed))) + " " + question.answer
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer("top left", add_special_tokens=False).input_ids) == "top left"


def test_patch_labels_name_what_covers_a_patch(modules, scene):
    train, _ = modules
    labels = train.patch_labels(scene).reshape(24, 24, -1)

    def column(word):
        return labels[..., train.LABELS.index(word)]

    car = np.zeros((24, 24), bool)
    car[1:4, 2:5] = True
    assert np.array_equal(column("car") == 1, car)
    assert np.array_equal(column("red") == 1, car)
    assert (column("cat")[14:17, 14:17] != 0).all()
    assert np.array_equal(column("brick") == 1, np.repeat(np.arange(24) >= 18, 24).reshape(24, 24))
    assert np.array_equal(column("left") == 1, np.tile(np.arange(24) < 12, (24, 1)))
    assert (column("dog") == 0).all()
    assert np.array_equal(column("word"), column("exit")) and (column("number") == 0).all()


def test_a_scene_survives_its_line(modules, scene):
    train, scenes = modules
    again = train.recall(train.json.dumps(train.describe(scene)))
    assert again == scene
    assert scenes.ask(again) == scenes.ask(scene)


def test_packed_questions_answer_as_questions_alone(modules, scene):
    train, scenes = modules
    tokenizer = train.build_tokenizer()
    torch.manual_seed(0)
    model = train.build_model(len(tokenizer))
    questions = scenes.ask(scene)
    features = torch.randn(1, 20, train.FEATURES)
    with torch.no_grad():
        together, wanted = train.answer_logits(model, features, train.pack(tokenizer, [questions], 20))
        alone = [train.answer_logits(model, features, train.pack(tokenizer, [[q]], 20)) for q in questions]
    assert wanted.tolist() == torch.cat([tokens for _, tokens in alone]).tolist()
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), rtol=1e-4, atol=1e-5)


def test_a_packed_question_is_the_prompt_that_the_processor_writes(modules, scene):
    train, scenes = modules
    tokenizer = train.build_tokenizer()
    question = scenes.ask(scene)[0]
    processor = train.build_processor(tokenizer)
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    written = processor(images=train.Image.new("RGB", (336, 336)), text=prompt).input_ids[0]
    packed = train.pack(tokenizer, [[question]], train.PATCHES)["ids"][0].tolist()
    assert packed[: len(written)] == list(written)
    assert tokenizer.decode(packed[len(written) :]) == question.answer


def test_a_part_of_a_crowded_scene_leaves_the_rest_out(modules, scene):
    train, scenes = modules
    for seed in range(20):
        part, left_out = train.part_of(scene, random.Random(seed))
        kept = part.objects + part.texts
        assert len(kept) + len(left_out) == 3 and not any(item in kept for item in left_out)
        assert {item.name for item in part.texts} <= {"exit"} and part.bands == scene.bands


def test_a_reading_batch_shows_one_text_and_asks_for_it(modules, scene):
    train, scenes = modules
    second = scenes.Item("7", (28, 140, 70, 182))
    scene = scenes.Scene("salient", "train", 1, train.NO_PICTURE, [], [*scene.texts, second])
    empty = scenes.Scene("salient", "train", 2, train.NO_PICTURE)
    cache = train.Cache.__new__(train.Cache)
    cache.scenes, cache.features = [scene, empty], np.tile(np.arange(train.PATCHES), (2, 1))[..., None]
    tokenizer = train.build_tokenizer()
    features, packed = train.reading_batch(tokenizer, [cache], 12, random.Random(0))
    answers = set()
    for row, labels in zip(features[..., 0].long(), packed["labels"], strict=True):
        answer = tokenizer.decode(labels[labels >= 0], skip_special_tokens=True)
        text = next(text for text in scene.texts if text.name == answer)
        other = next(text for text in scene.texts if text.name != answer)
        shown = set(row.tolist())
        assert len(shown) == train.GLIMPSE and set(np.flatnonzero(train.touched([text]))) <= shown
        assert not shown & set(np.flatnonzero(train.touched([other])))
        answers.add(answer)
    assert answers == {"exit", "7"}


def write_cache(train, work, scene):
    """Two scenes of each split, with random features."""
    generator = np.random.default_rng(0)
    for name in ("train", "crowded", "val"):
        (work / f"{name}.jsonl").write_text(2 * (json.dumps(train.describe(scene)) + "\n"))
        generator.standard_normal((2, train.PATCHES, train.FEATURES)).astype(np.float16).tofile(work / f"{name}.f16")


class Tower(torch.nn.Module):
    """Stands for the vision tower: the features of each of four patches are the picture's mean."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Module()
        self.encoder.layer = []

    def embeddings(self, pixels):
        return pixels.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 5, 384)


def test_extraction_goes_on_behind_half_a_line(modules, scene, tmp_path, capsys, monkeypatch):
    train, scenes = modules
    monkeypatch.setattr(train, "PATCHES", 4)
    monkeypatch.setattr(train, "ROW_BYTES", 4 * train.FEATURES * 2)
    train.extract(Tower(), tmp_path, "val", 6, batch=2)
    whole, features = (tmp_path / "val.jsonl").read_text(), (tmp_path / "val.f16").read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = "".join(lines[:2]) + lines[2][:30]
    (tmp_path / "val.jsonl").write_text(cut)
    (tmp_path / "val.f16").write_bytes(features[: 4 * train.ROW_BYTES - 5])
    train.extract(Tower(), tmp_path, "val", 6, batch=2)
    assert (tmp_path / "val.jsonl").read_text() == cut + "\n" + "".join(lines[3:])
    assert (tmp_path / "val.f16").read_bytes() == features
    cache = train.Cache(tmp_path, "val")
    assert f"{tmp_path / 'val.jsonl'} line 3 is no record and is skipped" in capsys.readouterr().err
    assert [scene.seed for scene in cache.scenes] == [0, 0, 1, 2, 2]
    rows = np.frombuffer(features, np.float16).reshape(6, 4, -1)[[0, 1, 3, 4, 5]]
    assert all(np.array_equal(cache.features[index], row) for index, row in enumerate(rows))
    assert np.array_equal(cache.features[1:4], rows[1:4])


def test_scenes_without_features_are_skipped_and_named(modules, scene, tmp_path, capsys):
    train, _ = modules
    write_cache(train, tmp_path, scene)
    features = (tmp_path / "val.f16").read_bytes()
    (tmp_path / "val.f16").write_bytes(features[:-1])
    assert len(train.Cache(tmp_path, "val")) == 1
    assert "val.f16 ends after 1 scenes; those of further lines are skipped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="val.f16 has 1 of the 2 scenes in .*val.jsonl. Remove both"):
        train.extract(Tower(), tmp_path, "val", 4)
    assert (tmp_path / "val.f16").read_bytes() == features[:-1]
    (tmp_path / "val.f16").unlink()
    with pytest.raises(ValueError, match="has no whole 'val' scenes. Run `train_demo.py features"):
        train.Cache(tmp_path, "val")


@pytest.mark.contract
def test_training_goes_on_where_it_was_stopped(modules, scene, tmp_path, capsys):
    train, _ = modules
    steps = {"align": 2, "read": 1, "part": 2, "full": 2}
    states = {}
    for name, runs in {
        "at once": [steps],
        "stopped twice": [{**steps, "read": 0, "part": 0, "full": 0}, {**steps, "part": 1, "full": 0}, steps],
    }.items():
        work = tmp_path / name
        work.mkdir()
        write_cache(train, work, scene)
        for run in runs:
            train.train(work, run, batch=1)
        states[name] = torch.load(work / "state.pt")
    assert states["at once"]["at"] == states["stopped twice"]["at"] == steps
    for name, weight in states["at once"]["model"].items():
        assert torch.equal(weight, states["stopped twice"]["model"][name]), name
    reports = [json.loads(line)["stage"] for line in capsys.readouterr().out.splitlines()]
    assert reports == ["part", "full", "part", "part", "full"]  # none of a stage that had nothing left to do


@pytest.mark.contract
def test_an_exported_folder_answers(modules, scene, tmp_path):
    train, _ = modules
    write_cache(train, tmp_path, scene)
    train.train(tmp_path, {"align": 1, "read": 1, "part": 0, "full": 0}, batch=1)
    train.export(tmp_path, tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {train.TRAINED, train.TOWER}
    trained = load_file(tmp_path / "folder" / train.TRAINED)
    assert all(index["weight_map"][name] == train.TRAINED for name in trained)
    tokenizer, model = train.load(tmp_path)
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(trained[name], model.state_dict()[f"model.{name}"])
    assert set(train.validate(model, tokenizer, train.Cache(tmp_path, "val"))) >= {"presence", "count", "region"}


@pytest.mark.parametrize("task, missing", [("train", "train.*features"), ("validate", "state.pt.*train")])
def test_a_step_without_the_one_before(modules, task, missing, tmp_path, monkeypatch):
    train, _ = modules
    monkeypatch.setattr(sys, "argv", ["train_demo.py", task, str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=missing):
        train.main()


@pytest.mark.parametrize("seed", range(3))
def test_attention_by_rows_is_attention(modules, seed):
    train, _ = modules
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, 3, 200 + 70 * seed, 8, generator=generator)
    length = query.shape[2]
    mask = torch.rand(2, 1, length, length, generator=generator) < 0.5
    mask = (mask | torch.eye(length, dtype=torch.bool)).tril()
    found, _ = train.attend_by_rows(None, query, key, value, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_every_trained_weight_has_one_optimizer(modules):
    train, _ = modules
    model = train.build_model(112)
    optimizers = train.build_optimizers(model)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    trained = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    assert sorted(map(id, held)) == sorted(map(id, trained))


def test_bfloat16_is_used_where_the_cpu_has_it_alone(modules, monkeypatch):
    train, _ = modules
    for known, expected in (
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "some"}, False),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"neon": True, "arm_bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert train.computes_in_bfloat16() is expected
        kind = torch.optim.Muon if expected else train.FloatMuon
        assert type(train.build_optimizers(train.build_model(112))[0]) is kind
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not train.computes_in_bfloat16()


def test_without_bfloat16_nothing_is_computed_in_it(modules, scene, monkeypatch):
    """A stage of questions and a step of each optimizer, watched call by call."""
    train, scenes = modules
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    tokenizer = train.build_tokenizer()
    model = train.build_model(len(tokenizer))
    packed = train.pack(tokenizer, [scenes.ask(scene)], 20)
    seen = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            seen.add(getattr(result, "dtype", None))
            return result

    with Watch():
        with torch.autocast("cpu", torch.bfloat16, enabled=train.computes_in_bfloat16()):
            logits, wanted = train.answer_logits(model, torch.randn(1, 20, train.FEATURES), packed)
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        for optimizer in train.build_optimizers(model):
            optimizer.step()
    assert torch.float32 in seen and torch.bfloat16 not in seen


def test_muon_in_float32_is_muon(modules, monkeypatch):
    """That of PyTorch, made to stay in the precision of the gradients, step by step from one state."""
    train, _ = modules
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 6), (3, 11), (11, 3))
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape, dtype=torch.double)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [train.FloatMuon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for step in range(4):
        if step == 2:
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, dtype=torch.double, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
