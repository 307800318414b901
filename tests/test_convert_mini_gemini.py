"""`prunesid convert` of Mini-Gemini, on tiny checkpoints of exactly MGM's layout: names, shapes, dtypes, folders."""

import json
import re

import clean_process
import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXT, VISION
from tiny_checkpoint import build_processor, picture
from tiny_mini_gemini import HIGH, HIGH_RES, LOW, PATCH
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm
from torch.nn.functional import linear as linear_map
from transformers import CLIPVisionConfig

from modeling_prunesid import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from modeling_prunesid.presets import read_preset
from prunesid_cli import convert, mini_gemini_checkpoint
from prunesid_cli.command import main


NUM_WORDS = 120
MAIN = {"model_type": "mgm", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_size_aux": HIGH}


def linear(name, out_dim, in_dim):
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def norm(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def language_model_shapes():
    dim, hidden, key_dim = TEXT["hidden_size"], TEXT["intermediate_size"], TEXT["hidden_size"] // 2
    shapes = {"model.embed_tokens.weight": (NUM_WORDS, dim), "lm_head.weight": (NUM_WORDS, dim)}
    shapes["model.norm.weight"] = (dim,)
    for layer in range(TEXT["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, rows in (("q", dim), ("k", key_dim), ("v", key_dim), ("o", dim)):
            shapes[f"{name}.self_attn.{part}_proj.weight"] = (rows, dim)
        for part, shape in (("gate", (hidden, dim)), ("up", (hidden, dim)), ("down", (dim, hidden))):
            shapes[f"{name}.mlp.{part}_proj.weight"] = shape
        shapes |= {f"{name}.input_layernorm.weight": (dim,), f"{name}.post_attention_layernorm.weight": (dim,)}
    return shapes


def projector_shapes():
    low, high, dim = VISION["hidden_size"], sum(HIGH_RES["hidden_sizes"]), TEXT["hidden_size"]
    shapes = linear("model.mm_projector.0", dim, low) | linear("model.mm_projector.2", dim, dim)
    for part, width in (("query", low), ("aux", high), ("val", high)):
        name = f"model.vlm_uni_{part}_projector"
        shapes |= norm(f"{name}.0", width) | linear(f"{name}.1", low, width)
    return shapes


def clip_shapes(prefix=""):
    dim, hidden = VISION["hidden_size"], VISION["intermediate_size"]
    name = f"{prefix}vision_model"
    shapes = {
        f"{name}.embeddings.class_embedding": (dim,),
        f"{name}.embeddings.patch_embedding.weight": (dim, 3, PATCH, PATCH),
        f"{name}.embeddings.position_embedding.weight": ((LOW // PATCH) ** 2 + 1, dim),
        **norm(f"{name}.pre_layrnorm", dim),
        **norm(f"{name}.post_layernorm", dim),
    }
    for layer in range(VISION["num_hidden_layers"]):
        block = f"{name}.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{part}", dim, dim)
        shapes |= linear(f"{block}.mlp.fc1", hidden, dim) | linear(f"{block}.mlp.fc2", dim, hidden)
        shapes |= norm(f"{block}.layer_norm1", dim) | norm(f"{block}.layer_norm2", dim)
    return shapes


def convnext_shapes(stem, stages):
    widths, depths = HIGH_RES["hidden_sizes"], HIGH_RES["depths"]
    shapes = {f"{stem}.0.weight": (widths[0], 3, 4, 4), f"{stem}.0.bias": (widths[0],), **norm(f"{stem}.1", widths[0])}
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            before = widths[stage - 1]
            shapes |= norm(f"{stages}.{stage}.downsample.0", before)
            shapes[f"{stages}.{stage}.downsample.1.weight"] = (width, before, 2, 2)
            shapes[f"{stages}.{stage}.downsample.1.bias"] = (width,)
        for block in range(depth):
            name = f"{stages}.{stage}.blocks.{block}"
            shapes |= {f"{name}.gamma": (width,), f"{name}.conv_dw.weight": (width, 1, 7, 7)}
            shapes |= {f"{name}.conv_dw.bias": (width,), **norm(f"{name}.norm", width)}
            shapes |= linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
    return shapes


def fill(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).mul(0.3).to(dtype) for name, shape in shapes.items()}


def save_clip(folder):
    """As OpenAI's: both halves of CLIP in one pickle."""
    folder.mkdir()
    weights = fill(clip_shapes(), torch.float32, seed=1)
    weights["vision_model.embeddings.position_ids"] = torch.arange((LOW // PATCH) ** 2 + 1)[None]
    weights |= fill(
        {"text_model.final_layer_norm.weight": (8,), "visual_projection.weight": (8, 32)}, torch.float32, 2
    )
    torch.save(weights, folder / "pytorch_model.bin")
    CLIPVisionConfig(**VISION).save_pretrained(folder)
    return folder


def save_open_clip(folder):
    """As LAION's: the towers of image and text and a head in one pickle."""
    folder.mkdir()
    width = HIGH_RES["hidden_sizes"][-1]
    shapes = convnext_shapes("visual.trunk.stem", "visual.trunk.stages")
    others = {**norm("visual.trunk.head.norm", width), "visual.head.mlp.fc1.weight": (8, width), "logit_scale": ()}
    torch.save(fill(shapes | others, torch.float32, seed=3), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {}}}))
    return folder


def save_mgm(folder, extra=None, **fields):
    """As published: sharded, in bfloat16, without a placeholder in the vocabulary."""
    folder.mkdir()
    weights = fill({**language_model_shapes(), **projector_shapes(), **(extra or {})}, torch.bfloat16, seed=4)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(weights)
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: weights[name] for name in part}, folder / f"model-0000{shard}-of-00002.safetensors")
    text = {name: value for name, value in TEXT.items() if name != "model_type"}
    own = {"mm_hidden_size": 32, "image_aspect_ratio": "pad", "tune_mm_mlp_adapter": False, "use_mm_proj": True}
    config = {**text, **own, "architectures": ["MGMLlamaForCausalLM"], "torch_dtype": "bfloat16", **MAIN, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = build_processor().tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["word100"] = vocabulary.pop("<image>")
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return save_clip(folder / "clip"), save_open_clip(folder / "open_clip")


@pytest.fixture(scope="module")
def converted(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    save_mgm(folder / "mgm")
    mini_gemini_checkpoint.bring_into_layout(folder / "mgm", *towers, folder / "out")
    return folder


def load(folder):
    model, info = MiniGeminiForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def test_every_weight_is_somewhere_and_every_place_is_filled(converted, towers):
    model = load(converted / "out")
    given = mini_gemini_checkpoint.gather(converted / "mgm", list(towers))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert len(given) == len(parameters)
    assert model.dtype == torch.bfloat16
    found = {name: tensor for name, tensor in parameters.items() if tensor.shape[0] != NUM_WORDS + 1}
    # Each tensor is told by its values: all were drawn at random.
    sums = {round(float(tensor.to(torch.bfloat16).double().sum()), 9) for tensor in given.values()}
    assert all(round(float(tensor.double().sum()), 9) in sums for tensor in found.values())


def test_the_convnext_computes_what_the_published_names_mean(converted, towers):
    """timm's forward, written out on the weights by their names in OpenCLIP's checkpoint."""
    model = load(converted / "out").float()
    names = {
        name: tensor.bfloat16().float() for name, tensor in mini_gemini_checkpoint.read_weights(towers[1]).items()
    }

    def of(name):
        return names[f"visual.trunk.{name}.weight"], names[f"visual.trunk.{name}.bias"]

    def normed(maps, name):
        return layer_norm(maps.movedim(1, -1), maps.shape[1:2], *of(name), eps=1e-6)

    images = torch.randn(1, 3, HIGH, HIGH, generator=torch.Generator().manual_seed(0))
    maps, stages = normed(conv2d(images, *of("stem.0"), stride=4), "stem.1").movedim(-1, 1), []
    for stage, depth in enumerate(HIGH_RES["depths"]):
        if stage:
            maps = normed(maps, f"stages.{stage}.downsample.0").movedim(-1, 1)
            maps = conv2d(maps, *of(f"stages.{stage}.downsample.1"), stride=2)
        for index in range(depth):
            block = f"stages.{stage}.blocks.{index}"
            inner = conv2d(maps, *of(f"{block}.conv_dw"), padding=3, groups=maps.shape[1])
            inner = linear_map(
                gelu(linear_map(normed(inner, f"{block}.norm"), *of(f"{block}.mlp.fc1"))), *of(f"{block}.mlp.fc2")
            )
            maps = maps + (inner * names[f"visual.trunk.{block}.gamma"]).movedim(-1, 1)
        stages.append(maps)
    size = stages[0].shape[-2:]
    expected = torch.cat([interpolate(stage, size=size, mode="bilinear") for stage in stages], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model.model.get_high_res_features(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("model.mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        ("model.vlm_uni_query_projector.0.weight", "model.patch_info_mining.query_projector.0.weight"),
        ("model.vlm_uni_aux_projector.1.bias", "model.patch_info_mining.key_projector.1.bias"),
        ("model.vlm_uni_val_projector.1.weight", "model.patch_info_mining.value_projector.1.weight"),
        ("model.vision_tower_aux.vision_stem.1.bias", "model.high_res_vision_tower.embeddings.layernorm.bias"),
        (
            "model.vision_tower_aux.vision_stages.2.downsample.1.weight",
            "model.high_res_vision_tower.encoder.stages.2.downsampling_layer.1.weight",
        ),
        (
            "model.vision_tower_aux.vision_stages.2.blocks.26.mlp.fc2.bias",
            "model.high_res_vision_tower.encoder.stages.2.layers.26.pwconv2.bias",
        ),
        (
            "model.vision_tower_aux.vision_stages.0.blocks.1.norm.weight",
            "model.high_res_vision_tower.encoder.stages.0.layers.1.layernorm.weight",
        ),
        (
            "model.vision_tower_aux.vision_stages.3.blocks.2.gamma",
            "model.high_res_vision_tower.encoder.stages.3.layers.2.layer_scale_parameter",
        ),
        ("model.layers.31.mlp.up_proj.weight", "model.language_model.layers.31.mlp.up_proj.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.unheard_of.weight", "model.unheard_of.weight"),
    ],
)
def test_names(theirs, ours):
    assert mini_gemini_checkpoint.rename(theirs) == ours


def test_the_configuration_is_the_checkpoints(converted):
    config = load(converted / "out").config
    assert (config.text_config.model_type, config.text_config.num_key_value_heads) == ("llama", 2)
    assert not any(re.match("mm_|image_|tune_", name) for name in config.text_config.to_dict())
    assert config.vision_config.patch_size == PATCH
    assert config.high_res_vision_config.hidden_sizes == HIGH_RES["hidden_sizes"]
    assert config.high_res_vision_config.depths == HIGH_RES["depths"]
    assert (config.high_res_vision_config.image_size, config.image_grid, config.image_global) == (HIGH, 1, False)


def test_the_placeholder_gets_the_mean_of_the_rows(converted):
    model, processor = load(converted / "out"), MiniGeminiProcessor.from_pretrained(converted / "out")
    assert processor.image_token_id == model.config.image_token_id == NUM_WORDS
    for rows in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert len(rows) == NUM_WORDS + 1
        torch.testing.assert_close(rows[-1], rows[:-1].float().mean(0).to(rows.dtype), rtol=1e-4, atol=1e-5)


def test_the_processor_and_the_model_answer_a_chat_with_two_pictures(converted):
    model, processor = load(converted / "out"), MiniGeminiProcessor.from_pretrained(converted / "out")
    content = [{"type": "image", "image": picture(0)}, {"type": "image", "image": picture(1)}]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": "word7"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith("A chat between a curious user")
    assert text.endswith("USER: Image 1:<image>\nImage 2:<image>\nword7 ASSISTANT:")
    inputs = processor(images=[picture(0), picture(1)], text=text, return_tensors="pt").to(model.dtype)
    assert int((inputs["input_ids"] == NUM_WORDS).sum()) == 2 * model.config.num_image_tokens
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """The clean process that verifies is forked; `test_convert.py` starts one."""
    monkeypatch.setattr(convert, "subprocess", clean_process)


@pytest.mark.contract
def test_convert_goes_on_with_it(converted, tmp_path):
    report = convert.convert(
        str(converted / "out"), tmp_path / "variant", read_preset("mini_gemini_64").fields | {"budget": 8}
    )
    assert report["class"] == "PruneSIDMiniGeminiForConditionalGeneration"
    assert report["processor"]


@pytest.mark.contract
@pytest.mark.parametrize("settings", [[], ["--preset", "mini_gemini_64", "--budget", "8"]], ids=["layout", "variant"])
def test_one_command_converts_it(converted, towers, tmp_path, settings, capsys):
    given = ["--vision-tower", str(towers[0]), "--high-res-vision-tower", str(towers[1])]
    main(["convert", str(converted / "mgm"), *given, *settings, "--output", str(tmp_path / "out")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["model"] == str(converted / "mgm")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if settings:
        assert report["class"] == "PruneSIDMiniGeminiForConditionalGeneration" and report["budget"] == 8
        assert str(converted / "mgm") in (tmp_path / "out" / "README.md").read_text()
        assert ".convert-" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.[jm][sd]*"))
    else:
        stock, expected = load(tmp_path / "out"), load(converted / "out")
        assert all(torch.equal(one, other) for one, other in zip(stock.parameters(), expected.parameters()))


@pytest.mark.parametrize("budget", [192, 128, 64])
def test_presets_are_the_papers(budget):
    assert read_preset(f"mini_gemini_{budget}").fields == {"budget": budget}


def test_towers_in_the_checkpoint_take_precedence_and_hd_is_a_setting(towers, tmp_path):
    own = clip_shapes("model.vision_tower.vision_tower.")
    own |= convnext_shapes("model.vision_tower_aux.vision_stem", "model.vision_tower_aux.vision_stages")
    save_mgm(tmp_path / "mgm", own, image_grid=2, image_global=True, image_size_aux=2 * HIGH)
    mini_gemini_checkpoint.bring_into_layout(tmp_path / "mgm", towers[0], None, tmp_path / "out")
    model, given = load(tmp_path / "out"), mini_gemini_checkpoint.read_weights(tmp_path / "mgm")
    weight = given["model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"]
    assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, weight)
    stem = given["model.vision_tower_aux.vision_stem.0.weight"]
    assert torch.equal(model.model.high_res_vision_tower.embeddings.patch_embeddings.weight, stem)
    processor = MiniGeminiProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=picture(), text="<image> word7", return_tensors="pt").to(model.dtype)
    assert inputs["pixel_values"].shape == (1, 5, 3, LOW, LOW)
    assert model(**inputs).logits.isfinite().all()


class TestErrors:
    def test_a_weight_without_a_place(self, towers, tmp_path):
        save_mgm(tmp_path / "mgm", {"model.unheard_of.weight": (3,)})
        with pytest.raises(ValueError, match="unexpected keys, for example model.unheard_of.weight"):
            mini_gemini_checkpoint.bring_into_layout(tmp_path / "mgm", *towers, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_tower_that_is_nowhere(self, towers, tmp_path):
        save_mgm(tmp_path / "mgm")
        with pytest.raises(ValueError, match="--high-res-vision-tower"):
            mini_gemini_checkpoint.bring_into_layout(tmp_path / "mgm", towers[0], None, tmp_path / "out")

    @pytest.mark.parametrize(
        "fields",
        [{"model_type": "mgm_mixtral"}, {"mm_projector_type": "linear"}, {"mm_vision_select_feature": "cls_patch"}],
    )
    def test_another_architecture(self, towers, tmp_path, fields):
        save_mgm(tmp_path / "mgm", **fields)
        with pytest.raises(ValueError, match=next(iter(fields))):
            mini_gemini_checkpoint.bring_into_layout(tmp_path / "mgm", *towers, tmp_path / "out")

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(ValueError, match="holds no weights"):
            mini_gemini_checkpoint.read_weights(tmp_path)

    def test_arguments_that_do_not_fit(self, converted, towers, tmp_path, capsys):
        tower = ["--vision-tower", towers[0]]
        for arguments, message in (
            ([converted / "mgm"], "it must be a folder, with --vision-tower"),
            ([converted / "mgm", *tower, "--thin", "--budget", "8"], "Convert it without --thin"),
            ([converted / "out", *tower, "--budget", "8"], "are for published checkpoints of Mini-Gemini, got"),
        ):
            with pytest.raises(SystemExit):
                main(["convert", *map(str, arguments), "--output", str(tmp_path / "refused")])
            assert message in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()

    def test_other_commands_name_the_one_that_takes_it(self, converted):
        with pytest.raises(ValueError, match="prunesid convert .*mgm --vision-tower"):
            convert.find_family(str(converted / "mgm"))
