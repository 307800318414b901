"""The list of families: what is declared, what Transformers lacks, what does not fit, and whose class is asked for."""

import json
import sys
from pathlib import Path

import oracle_family as contract
import pytest
import torch
import transformers
from clean_process import run_clean
from families import ROWS
from transformers.dynamic_module_utils import HF_MODULES_CACHE
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import modeling_prunesid
from modeling_prunesid import PruneSIDForImageTextToText, PruneSIDInternVLForConditionalGeneration, families
from modeling_prunesid.auto import head_of
from modeling_prunesid.families import FAMILIES, UNSUPPORTED, release_with
from modeling_prunesid.family import stock_class
from prunesid_cli import demo
from prunesid_cli.evaluate import load_model


ROOT = Path(__file__).parents[1]


def path_of(family):
    return Path(modeling_prunesid.__file__).with_name(f"modeling_prunesid_{family}.py")


def in_a_new_process(code, home, *arguments):
    """Of a process that has nothing but our package."""
    # The code of repos that this process has loaded is not among what the other one has.
    paths = [str(ROOT), *(path for path in sys.path if path not in ("", str(ROOT), HF_MODULES_CACHE))]
    return run_clean(f"import sys\nsys.path[:0] = {paths}\n{code}", home, *arguments)


def test_every_family_is_in_the_contract():
    assert set(FAMILIES) - {"mini_gemini"} == {row.family for row in ROWS.values()}


def test_every_model_type_is_declared_or_has_a_reason():
    known = {name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if not name.startswith("prunesid")}
    ours = {"mini_gemini", "vitcop_llava", "layer_pruned_llava"}
    assert not known - set(FAMILIES) - set(UNSUPPORTED) - ours
    assert not set(FAMILIES) & set(UNSUPPORTED)


@pytest.mark.contract
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_file_declares_its_family(family):
    if release_with(family) is not None:
        return
    head = head_of(family)
    assert head.config_class.model_type == f"prunesid_{family}"
    assert Path(sys.modules[head.__module__].__file__) == path_of(family)


def test_a_declaration_is_short():
    """What several families share, and what a family computes, stands in mixins that travel with these alone."""
    lengths = {family: len(path_of(family).read_text().splitlines()) for family in FAMILIES}
    assert not {family: length for family, length in lengths.items() if length > 60}


def test_importing_the_package_imports_no_family(tmp_path):
    code = """
import json, sys
import modeling_prunesid
loaded = [name for name in sys.modules if name.startswith("modeling_prunesid.modeling_prunesid_")]
print(json.dumps([loaded, "PruneSIDInternVLModel" in dir(modeling_prunesid)]))
"""
    assert in_a_new_process(code, tmp_path) == [[], True]


@pytest.mark.contract
def test_auto_classes_find_a_saved_variant(tmp_path):
    row = ROWS["internvl"]
    torch.manual_seed(0)
    row.head(row.head.config_class(**row.config, prunesid_config={"budget": 7})).save_pretrained(tmp_path)
    code = """
import json, sys
import modeling_prunesid
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
config = AutoConfig.from_pretrained(sys.argv[1])
classes = [AutoModelForImageTextToText.from_pretrained(sys.argv[1]), AutoModelForImageTextToText.from_config(config)]
names = [type(config).__name__, *(type(model).__name__ for model in classes)]
names.append(type(AutoModel.from_config(config)).__name__)
print(json.dumps([*names, config.prunesid_config.budget]))
"""
    head = "PruneSIDInternVLForConditionalGeneration"
    assert in_a_new_process(code, tmp_path / "home", tmp_path) == [
        "PruneSIDInternVLConfig",
        head,
        head,
        "PruneSIDInternVLModel",
        7,
    ]


@pytest.mark.contract
def test_a_repo_carries_its_own_family_alone(tmp_path):
    row = ROWS["internvl"]
    row.head(row.head.config_class(**row.config)).save_pretrained(tmp_path)
    carried = {path.name for path in tmp_path.glob("*.py")}
    assert [name for name in carried if name.startswith("modeling_")] == ["modeling_prunesid_internvl.py"]
    assert "tiles.py" in carried
    assert not {"families.py", "auto.py", "whole.py", "anyres.py", "mrope.py"} & carried
    code = """
import json, sys
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([type(model).__name__, type(model).__module__.startswith("transformers_modules")]))
"""
    assert in_a_new_process(code, tmp_path / "home", tmp_path) == ["PruneSIDInternVLForConditionalGeneration", True]


def test_a_family_that_is_missing_names_its_release(monkeypatch):
    monkeypatch.setattr(families, "CONFIG_MAPPING_NAMES", {})
    assert release_with("molmo2") == "5.20.0" and release_with("internvl") == "5.18.0"
    assert release_with("mini_gemini") is None
    vars(modeling_prunesid).pop("PruneSIDMolmo2Model", None)
    with pytest.raises(AttributeError, match="needs Transformers 5.20.0.*transformers>=5.20.0"):
        _ = modeling_prunesid.PruneSIDMolmo2Model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stock InternVL."""
    row, folder = ROWS["internvl"], tmp_path_factory.mktemp("internvl")
    stock = stock_class(row.head)
    stock(stock.config_class(**row.config)).save_pretrained(folder)
    return folder


def test_the_class_is_that_of_the_checkpoint(checkpoint, tmp_path):
    model = PruneSIDForImageTextToText.from_pretrained(checkpoint, prunesid_config={"budget": 3})
    assert type(model) is PruneSIDInternVLForConditionalGeneration
    assert model.config.prunesid_config.budget == 3
    model.save_pretrained(tmp_path)
    again, info = PruneSIDForImageTextToText.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.bfloat16)
    assert type(again) is type(model) and again.dtype == torch.bfloat16
    assert again.config.prunesid_config.budget == 3 and not info["missing_keys"]
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    random = PruneSIDForImageTextToText.from_config(config, prunesid_config={"budget": 4})
    assert type(random) is type(model) and random.config.prunesid_config.budget == 4


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("mllama", "does not fit model_type='mllama': .*cross-attention"),
        ("florence2", "encoder-decoder"),
        ("llama", "No PruneSID family is declared for model_type='llama'. docs/new_family.md"),
        ("lama", "Check the name; the families are: .*internvl"),
    ],
)
def test_what_does_not_fit_says_so(tmp_path, model_type, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=message):
        PruneSIDForImageTextToText.from_pretrained(tmp_path)


def test_it_is_no_model_itself():
    with pytest.raises(OSError, match="from_pretrained"):
        PruneSIDForImageTextToText()


SIGLIP_400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
# The towers of published checkpoints but for their depth, by upstream's defaults and model cards: fields of the
# stock configuration, pixels, T of an image or tile, patches of the tower.
PUBLISHED = {
    "internvl": ({}, 448, 256, 1024),  # OpenGVLab/InternVL3-*-hf
    "gemma3": ({"vision_config": {**SIGLIP_400M, "image_size": 896}}, 896, 256, 4096),  # google/gemma-3-*
    "paligemma": ({"vision_config": {**SIGLIP_400M, "image_size": 448}}, 448, 1024, 1024),  # google/paligemma*-448
    "aya_vision": ({"vision_config": {**SIGLIP_400M, "image_size": 364}}, 364, 169, 676),  # CohereLabs/aya-vision-*
    "cohere2_vision": ({}, 512, 256, 1024),  # CohereLabs/command-a-vision
    # meta-llama/Llama-4-*
    "llama4": ({"vision_config": {"image_size": 336, "hidden_size": 1408, "num_attention_heads": 16}}, 336, 144, 576),
    "vipllava": ({}, 336, 576, 576),  # llava-hf/vip-llava-*
    "deepseek_vl": ({"vision_config": {"image_size": 384, "patch_size": 16}}, 384, 576, 576),  # deepseek-vl-1.3b-*
    "janus": ({}, 384, 576, 576),  # deepseek-community/Janus-Pro-*
}


@pytest.mark.contract
@pytest.mark.parametrize("family", [name for name in PUBLISHED if release_with(name) is None])
@torch.no_grad()
def test_published_towers_have_the_tokens_that_are_known_of_them(family):
    fields, size, num_tokens, num_patches = PUBLISHED[family]
    config = head_of(family).config_class(**fields, prunesid_config={"budget": None})
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers, vision.num_hidden_layers = 1, 5 if family == "vipllava" else 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    if family == "vipllava":
        config.vision_feature_layers = [-2, -5, 1]
    with torch.device("meta"):
        model = head_of(family)._from_config(config).eval()
        pixels = torch.empty(2, 3, size, size)
    base = getattr(model, "model", model)
    output = base.get_image_features(pixel_values=pixels, return_dict=True)
    assert [len(own) for own in base.features_of(output)] == [num_tokens] * 2
    attention = torch.empty(2, num_patches + (family in ("internvl", "llama4", "vipllava")))
    assert len(base.patches_of(attention).flatten()) == 2 * num_patches
    scores = base.pool_attention(torch.ones(2 * num_patches), "image", {"pixel_values": pixels}, 2 * num_tokens)
    assert torch.equal(scores, torch.ones(2 * num_tokens))
    for budget in (64, 0.25):
        config.prunesid_config.budget = budget
        kept = base.get_image_features(pixel_values=pixels, return_dict=True)["keep_indices"]
        assert [len(own) for own in kept] == [64 if budget == 64 else round(num_tokens / 4)] * 2


@pytest.mark.parametrize(
    "family", [name for name in ("gemma3", "molmo2", "qwen3_vl", "llama4") if release_with(name) is None]
)
@torch.no_grad()
def test_the_demo_has_the_stock_class_beside_any_family(family):
    ours, reference, row = contract.build(family)
    twin = demo.reference_model(ours)
    assert type(twin) is type(reference) and type(ours) is row.head
    inputs = contract.for_stock(row, contract.prompt(row))
    assert torch.equal(twin(**inputs).logits, reference(**inputs).logits)
    assert all(mine is theirs for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True))
    cases, runs = demo.list_runs(ours, twin, inputs, [3])
    for run in runs.values():
        run()
    ours.config.prunesid_config.budget = row.budget


def test_the_evaluation_of_scenes_is_of_llava(checkpoint):
    with pytest.raises(ValueError, match="must be a LLaVA-1.5 checkpoint.*'internvl'.*docs/lmms_eval.md"):
        load_model(checkpoint)
