"""Configurations as 0.1.0 saved them (commit 3ef991b), one of each family, load with their meaning kept."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText

import modeling_prunesid


CONFIGS = json.loads(Path(__file__).with_name("configs_0_1_0.json").read_text())
# The method of those that are not the paper's, and its settings.
METHODS = {
    "prunesid_llava score=cls_attention center=features quota=bounded keep_cls=True": ("release", None),
    "prunesid_llava score=cls_attention quota=spread": ("spread", None),
    "prunesid_llava grouping=kmeans seed=5 nms_lambda=auto": ("paper", {"grouping": "kmeans", "seed": 5}),
    "prunesid_video_llava": ("release", {"center": "tokens", "keep_cls": False}),
}
RETIRED = {"score", "center", "quota", "keep_cls", "grouping", "seed", "llm_budget"}
INSIDE = "prunesid_llava llm_budget=64"


def save(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    return tmp_path


def test_every_family_is_there():
    families = {name.split()[0] for name in CONFIGS} - {"embedded"}
    stems = {"llava", "llava_next", "mini_gemini", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llava"}
    assert families == {f"prunesid_{stem}" for stem in stems} | {"vitcop_llava"}


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {INSIDE}))
def test_it_loads_with_its_meaning_and_is_saved_in_the_new_words(name, tmp_path):
    saved = CONFIGS[name]
    config = AutoConfig.from_pretrained(save(tmp_path, name))
    assert type(config).__module__.startswith("modeling_prunesid.")
    key = "vitcop_config" if "vitcop_config" in saved else "prunesid_config"
    found = getattr(config, key).to_dict()
    unchanged = set(saved[key]) - RETIRED - {"transformers_version"}
    assert {field: found[field] for field in unchanged} == {field: saved[key][field] for field in unchanged}
    if key == "prunesid_config":
        assert (found["method"], found["method_settings"]) == METHODS.get(name, ("paper", None))
    for part in ("text_config", "vision_config"):
        theirs = getattr(config, part).to_dict()
        assert all(theirs[field] == value for field, value in saved[part].items() if field != "transformers_version")
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert getattr(again, key).to_dict() == found


def test_an_llm_budget_names_the_class_that_has_it_now(tmp_path):
    with pytest.raises(ValueError, match="LayerPrunedLlavaForConditionalGeneration. Load the model with it"):
        AutoConfig.from_pretrained(save(tmp_path, INSIDE))
    config = modeling_prunesid.LayerPrunedLlavaConfig.from_pretrained(tmp_path)
    assert (config.prunesid_config.budget, config.prunesid_config.llm_budget) == (96, 64)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("prunesid_llava") and name != INSIDE])
def test_a_model_of_it_has_the_same_weights_by_name(name, tmp_path):
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(save(tmp_path, name)))
    parts = {parameter.split(".")[1] for parameter in model.state_dict() if parameter.startswith("model.")}
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= parts
