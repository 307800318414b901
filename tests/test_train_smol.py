"""The prepared GPU run of a larger embedded model, on random weights of a tiny one and grey photographs."""

import importlib
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunesid_cli import scenes


WIDTH = 384


@pytest.fixture(autouse=True)
def precision():
    """A training allows faster products in its process, which the tests behind it are not to have."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def smol():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        yield importlib.import_module("train_smol")


@pytest.fixture(scope="module")
def tokenizer(smol):
    words = (
        "<|im_start|> <eos> Answer : yes no photograph floor wall is there any in the picture ? do you see how many"
    )
    words += " times does appear count . where which corner what colour have word printed read number made of material"
    words += " behind lies top bottom left right 1 2 3 " + " ".join(smol.LABELS)
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words.split()))}
    vocabulary["<unk>"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", additional_special_tokens=["<|im_start|>"]
    )


def language_model(size):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("shape", [(3, 64), (96, 320)])
def test_packed_weights_are_restored(smol, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coarse = smol.from_4_bits(smol.to_4_bits(weight))
    blocks = weight.reshape(-1, 32)
    step = (blocks.amax(1) - blocks.amin(1)) / 15
    assert ((coarse - weight).reshape(-1, 32).abs() <= step[:, None] * 0.51 + 2e-3).all()
    again = smol.from_4_bits(smol.to_4_bits(coarse))
    assert (again - coarse).abs().max() < 4e-3  # what has 16 levels already keeps them
    fine = smol.from_8_bits(smol.to_8_bits(weight))
    assert ((fine - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253).all()
    state = {"a.weight": torch.randn(200, 64), "a.bias": torch.randn(200), "b": torch.randn(2, 2)}
    restored = smol.unpack_state({f"x/{n}": v for n, v in smol.pack_state(state, smol.to_8_bits).items()}, "x/")
    assert torch.equal(restored["a.bias"], state["a.bias"]) and torch.equal(restored["b"], state["b"])
    assert (restored["a.weight"] - state["a.weight"]).abs().max() < 0.03


def pack(smol, tokenizer, folder):
    """What `pack` writes, of random weights."""
    model = language_model(len(tokenizer))
    vision = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=336, patch_size=14, use_mask_token=False,
        num_hidden_layers=11,
    )  # fmt: skip
    tower = {n: v for n, v in Dinov2Model(vision).state_dict().items() if not n.startswith("layernorm")}
    kept = {name: value for name, value in model.model.state_dict().items() if name != "embed_tokens.weight"}
    arrays = {f"llm/{name}": array for name, array in smol.pack_state(kept, smol.to_4_bits).items()}
    arrays |= {f"tower/{name}": array for name, array in smol.pack_state(tower, smol.to_8_bits).items()}
    arrays |= {"used": np.arange(len(tokenizer)), "embeddings": model.model.embed_tokens.weight.detach().numpy()}
    np.savez(folder / "weights.npz", **arrays)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "llm.json").write_text(model.config.to_json_string())
    (folder / "photographs").mkdir()
    names = {name for split in scenes.SPLITS for name in scenes.photographs(split)}
    for name in names | {f"{material}.png" for material in ("brick", "grass", "gravel")}:
        Image.effect_noise((512, 512), 40).convert("RGB").save(folder / "photographs" / f"{name}.jpg")
    with tarfile.open(folder / "files.tar.xz", "w:xz"):
        pass


@pytest.mark.contract
def test_a_tiny_run_writes_its_result_and_report(smol, tokenizer, tmp_path, monkeypatch):
    pack(smol, tokenizer, tmp_path)
    monkeypatch.setattr(smol, "TINY_SCENES", {"train": 4, "crowded": 2, "val": 2})
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "photograph", scenes.photograph)
        smol.main(["unpack", str(tmp_path)])
        smol.main(["train", str(tmp_path), "--out", str(tmp_path / "out"), "--tiny"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: own["steps"] for name, own in report["stages"].items()} == {"read": 3, "part": 3, "full": 3}
    assert set(report["validation"]) <= set(scenes.KINDS) and 0 <= report["mean"] <= 1
    trained = smol.load_file(tmp_path / "out" / "result.safetensors")
    ups = [name for name in trained if name.endswith(".up")]
    assert len(ups) == 2 * 7 and all(trained[name].abs().sum() > 0 for name in ups)
    assert {"linear_1.weight", "linear_2.bias", "body.norm.weight"} <= set(trained)
    assert not any("linear.weight" in name or name == "words" for name in trained)


def test_a_machine_without_a_gpu_is_refused(smol, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="train needs a CUDA GPU: .* --tiny tries it"):
        smol.train(tmp_path, tmp_path / "out", 7, False, 16)


def test_merged_weights_compute_what_was_trained(smol):
    torch.manual_seed(0)
    model = language_model(50)
    trained, state = {}, {name: value.clone() for name, value in model.model.state_dict().items()}
    body = model.model
    for layer in body.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(block, name, smol.Lora(module))
                    nn.init.normal_(getattr(block, name).up, std=0.1)
    nn.init.normal_(body.norm.weight)
    trained = {
        f"body.{name}": value.detach().clone()
        for name, value in body.named_parameters()
        if "norm" in name or name.endswith((".up", ".down"))
    }
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = body(ids).last_hidden_state
        fresh = language_model(50).model
        fresh.load_state_dict(smol.merged(state, trained, 3))
        torch.testing.assert_close(fresh(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    first = {name: value for name, value in trained.items() if "layers.2" not in name}
    assert not any(name.startswith("layers.2") for name in smol.merged(state, first, 2))


def test_packed_questions_answer_as_questions_alone(smol, tokenizer):
    """Each question sees the picture and itself; its answer has the prompt that the chat template writes."""
    weights = {
        "used": np.arange(len(tokenizer)),
        "embeddings": language_model(len(tokenizer)).model.embed_tokens.weight.detach().numpy(),
    }
    model = language_model(len(tokenizer))
    kept = {name: value for name, value in model.model.state_dict().items() if name != "embed_tokens.weight"}
    weights |= {f"llm/{name}": value.numpy() for name, value in kept.items()}
    own = smol.Smol(weights, model.config, 3).eval()
    scene = scenes.Scene("salient", "train", 0, Image.new("RGB", (1, 1)), [scenes.Item("cat", (0, 0, 50, 50))])
    questions = scenes.ask(scene, random.Random(0))
    features = torch.randn(1, 30, smol.FEATURES)
    with torch.no_grad():
        together, wanted = own.answers(features, smol.pack_questions(tokenizer, [questions], 30))
        alone = [own.answers(features, smol.pack_questions(tokenizer, [[q]], 30)) for q in questions]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), rtol=1e-3, atol=1e-4)
    assert wanted.tolist() == [token for q in questions for token in smol.answer_ids(tokenizer, q.answer)]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0].text}]}]
    told = tokenizer.apply_chat_template(
        message, chat_template=smol.CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    assert told == f"{smol.BEFORE}<image>{smol.AFTER.format(questions[0].text)}"


def test_batches_are_drawn_by_their_number(smol, tokenizer):
    drawn = []
    for seed in range(3):
        items = [scenes.Item("cat", (20, 20, 70, 70)), scenes.Item("car", (200, 200, 250, 250), "red")]
        texts = [scenes.Item("exit", (100, 10, 180, 40)), scenes.Item("7", (10, 200, 40, 240))]
        drawn.append(scenes.Scene("salient", "train", seed, Image.new("RGB", (1, 1)), items, texts))
    caches = [smol.Drawn("train", drawn, torch.empty(0))]
    for stage, count in (("read", 48), ("part", None), ("full", 576)):
        steps = smol.Steps(tokenizer, caches, stage, 2)
        first, again, other = steps[5], steps[5], steps[6]
        assert torch.equal(first["ids"], again["ids"]) and torch.equal(first["patches"], again["patches"])
        assert not torch.equal(first["patches"], other["patches"]) or stage == "full"
        assert (
            first["patches"].shape == (2, count or first["patches"].shape[1]) and (first["patches"].diff() > 0).all()
        )
        assert (first["ids"] == -1).sum(1).tolist() == [first["patches"].shape[1]] * 2
    shown = smol.touched([texts[0]]).nonzero()[0], smol.touched([texts[1]]).nonzero()[0]
    for row in smol.batch_of(tokenizer, caches, "read", 8, random.Random(0))["patches"]:
        seen = [np.isin(patches, row.numpy()).mean() for patches in shown]
        assert sorted(seen) == [0, 1]  # one text whole, nothing of the other
