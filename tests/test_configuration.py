"""PruneSIDConfig: valid or a clear error, and the same after every round trip."""

import copy
import json
import logging
import pickle

import pytest
from tiny import build, build_config, build_layer_pruned
from tiny_vitcop import build_vitcop

from modeling_prunesid import LayerPrunedConfig, PruneSIDConfig, PruneSIDLlavaConfig


PAPER = {
    "budget": 64,
    "budget_scope": "view",
    "num_groups": None,
    "layer": -2,
    "nms_lambda": None,
    "dynamic": False,
    "reference_information": None,
    "min_budget": None,
    "max_budget": None,
    "method": "paper",
    "method_settings": None,
    "mrope_positions": "original",
    "base_model_name_or_path": None,
    "base_model_revision": None,
}
RELEASE = {**PAPER, "method": "release", "method_settings": {"grouping": "kmeans", "seed": 7}}
DYNAMIC = {**PAPER, "dynamic": True, "reference_information": 0.4, "min_budget": 16, "max_budget": 192}

INVALID = {
    "budget": [0, -1, 0.0, 1.5, -0.5, float("nan"), float("inf"), "64", True, [64]],
    "num_groups": [0, -3, 2.5, "16", True],
    "layer": [1.0, "last", None, True],
    "nms_lambda": [0, -1.0, float("nan"), float("inf"), "paper", True],
    "dynamic": [1, None, "yes"],
    "reference_information": [0, -0.1, 2.1, float("nan"), "0.4", True],
    "budget_scope": ["crop", "", None, 1],
    "min_budget": [0, 1.5, "8", False],
    "max_budget": [0, 1.5, "8", True],
    "method": [None, 1],
    "method_settings": [[], "score", 1],
}
INVALID_OF_METHODS = {
    "score": ["energy", None, 1],
    "center": ["token", None, 0],
    "quota": ["even", None, 0],
    "keep_cls": [0, None, "no"],
    "grouping": ["knn", None, 0],
    "seed": [-1, 0.5, None, "0", True],
}
INVALID_FIELDS = [(name, value) for name, values in INVALID.items() for value in values]


def fields_of(config):
    return {name: getattr(config, name) for name in PAPER}


def test_defaults_are_the_papers():
    assert fields_of(PruneSIDConfig()) == PAPER


@pytest.mark.parametrize("budget", [1, 64, 2880, 0.001, 0.25, 1.0, None])
def test_valid_budgets(budget):
    assert PruneSIDConfig(budget=budget).budget == budget


@pytest.mark.parametrize("name, value", INVALID_FIELDS)
def test_invalid_value_is_refused_at_construction(name, value):
    with pytest.raises(ValueError, match=name) as error:
        PruneSIDConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name, value", INVALID_FIELDS)
def test_invalid_value_is_refused_at_assignment_and_changes_nothing(name, value):
    config = PruneSIDConfig()
    with pytest.raises(ValueError, match=name) as error:
        setattr(config, name, value)
    assert repr(value) in str(error.value)
    assert fields_of(config) == PAPER


@pytest.mark.parametrize(
    "name, value", [(name, value) for name in INVALID_OF_METHODS for value in INVALID_OF_METHODS[name]]
)
def test_an_invalid_setting_of_a_method_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"method_settings\['{name}'\] must be") as error:
        PruneSIDConfig(method="release", method_settings={name: value})
    assert repr(value) in str(error.value)
    config = PruneSIDConfig(method="release")
    config.method_settings = {name: value}
    with pytest.raises(ValueError, match=rf"method_settings\['{name}'\] must be"):
        config.check()


def test_a_method_and_its_settings_are_named():
    with pytest.raises(
        ValueError, match=r"prunesid_config.method must be one of \('paper', 'release', 'spread'\).*'fps'"
    ):
        PruneSIDConfig(method="fps")
    with pytest.raises(ValueError, match=r"'paper' may have \('grouping', 'seed', 'question'\), got 'score'"):
        PruneSIDConfig(method_settings={"score": "cls_attention"})
    with pytest.raises(ValueError, match=r"quota of version 0.1.0 beside method='spread'"):
        PruneSIDConfig(method="spread", quota="bounded")


@pytest.mark.parametrize(
    "saved, method, settings",
    [
        ({}, "paper", None),
        ({"grouping": "random", "seed": 3}, "paper", {"grouping": "random", "seed": 3}),
        ({"score": "cls_attention", "center": "features", "quota": "bounded", "keep_cls": True}, "release", None),
        ({"keep_cls": True}, "release", {"score": "component", "center": "tokens", "quota": "proportional"}),
        ({"score": "cls_attention", "quota": "spread"}, "spread", None),
        ({"quota": "spread"}, "spread", {"score": "component"}),
    ],
)
def test_settings_of_0_1_0_keep_their_meaning(saved, method, settings):
    config = PruneSIDConfig(**saved, llm_budget=None)
    assert (config.method, config.method_settings) == (method, settings)


def test_a_misspelt_name_is_refused_and_the_right_ones_are_listed():
    with pytest.raises(ValueError, match=r"no field 'bugdet'.*budget, budget_scope, dynamic"):
        PruneSIDConfig(bugdet=32)
    with pytest.raises(ValueError, match="no field 'bugdet'"):
        PruneSIDConfig().bugdet = 32
    with pytest.raises(ValueError, match="no field 'bugdet'"):
        build_config(bugdet=32)


def test_contradicting_bounds_are_refused():
    with pytest.raises(ValueError, match=r"llm_budget=96.*exceeds budget=64"):
        LayerPrunedConfig(budget=64, llm_budget=96)
    with pytest.raises(ValueError, match=r"min_budget=9.*max_budget=8"):
        PruneSIDConfig(min_budget=9, max_budget=8)


def test_a_dynamic_budget_needs_its_reference():
    with pytest.raises(ValueError, match=r"dynamic.*reference_information"):
        PruneSIDConfig(dynamic=True)


def test_a_total_needs_no_reference_and_has_no_bounds():
    PruneSIDConfig(budget_scope="image", dynamic=True)
    with pytest.raises(ValueError, match=r"budget_scope='image'.*max_budget=8"):
        PruneSIDConfig(budget_scope="image", max_budget=8)


@pytest.mark.parametrize("settings", [PAPER, RELEASE, DYNAMIC], ids=["paper", "release", "dynamic"])
class TestRoundTrip:
    def test_dict(self, settings):
        assert fields_of(PruneSIDConfig(**PruneSIDConfig(**settings).to_dict())) == settings

    def test_json(self, settings):
        assert fields_of(PruneSIDConfig(**json.loads(PruneSIDConfig(**settings).to_json_string()))) == settings

    def test_folder(self, settings, tmp_path):
        PruneSIDConfig(**settings).save_pretrained(tmp_path)
        assert fields_of(PruneSIDConfig.from_pretrained(tmp_path)) == settings

    def test_copy_and_pickle(self, settings):
        config = PruneSIDConfig(**settings)
        for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert fields_of(copied) == settings

    def test_nested_in_a_saved_model_configuration(self, settings, tmp_path):
        config = build_config(**settings)
        config.save_pretrained(tmp_path)
        loaded = PruneSIDLlavaConfig.from_pretrained(tmp_path)
        assert fields_of(loaded.prunesid_config) == settings
        assert loaded.to_dict() == config.to_dict()


def test_the_saved_settings_are_the_fields_alone():
    saved = PruneSIDConfig().to_dict()
    assert set(saved) == {*PAPER, "model_type", "transformers_version"}


def test_the_nested_configuration_may_be_given_in_every_form():
    for given in ({"budget": 32}, PruneSIDConfig(budget=32)):
        assert PruneSIDLlavaConfig(prunesid_config=given).prunesid_config.budget == 32
    assert fields_of(PruneSIDLlavaConfig().prunesid_config) == PAPER
    assert fields_of(PruneSIDLlavaConfig(prunesid_config=None).prunesid_config) == PAPER


def test_a_dict_assigned_later_is_validated():
    config = build_config()
    config.prunesid_config = {"budget": 16}
    assert config.prunesid_config.budget == 16
    with pytest.raises(ValueError, match="budget"):
        config.prunesid_config = {"budget": 0}
    assert config.prunesid_config.budget == 16


def test_a_dict_given_to_from_pretrained_is_merged_into_the_saved_settings(tmp_path):
    build_config(budget=64, method="release").save_pretrained(tmp_path)
    loaded = PruneSIDLlavaConfig.from_pretrained(tmp_path, prunesid_config={"budget": 32})
    assert (loaded.prunesid_config.budget, loaded.prunesid_config.method) == (32, "release")


@pytest.mark.parametrize("make", [build, lambda: build_layer_pruned(16, 8), build_vitcop])
def test_settings_have_no_attention_to_set(make, caplog, monkeypatch):
    """Upstream warns of a part of the configuration that has no model."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make()
    for part in (model, model.model):
        for implementation in ("eager", "sdpa", {"vision_config": "eager"}):
            part.set_attn_implementation(implementation)
    assert not caplog.records


def test_the_placeholder_is_that_of_the_stock_configuration():
    assert build_config().image_token_id == build_config().image_token_index == 100


def test_model_type_is_our_own():
    assert build_config().model_type == build_config().to_dict()["model_type"] == "prunesid_llava"
