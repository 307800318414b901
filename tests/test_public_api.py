"""What callers rely on: names, and upstream's own arguments in upstream's order."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.models.auto import modeling_auto

import modeling_prunesid
from modeling_prunesid import PruneSIDLlavaConfig, PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaModel
from modeling_prunesid.select_tokens import select_tokens


FAMILIES = ["Llava", "LlavaNext", "MiniGemini", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "VideoLlava"]
OURS = "num_visual_tokens"


def names_of(function):
    """Parameters by name, without `self` and what only gathers the rest."""
    gathers = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.name != "self" and parameter.kind not in gathers]


def test_every_promised_name_is_exported():
    promised = {"PruneSIDConfig", "PruneSIDLlavaProcessor", "ViTCoPConfig", "ViTCoPLlavaProcessor"}
    for family in ("ViTCoPLlava", "LayerPrunedLlava"):
        promised |= {f"{family}{part}" for part in ("Config", "Model", "ForConditionalGeneration", "Processor")}
    for family in FAMILIES:
        promised |= {f"PruneSID{family}{part}" for part in ("Config", "Model", "ForConditionalGeneration")}
    assert promised <= set(modeling_prunesid.__all__)
    assert all(hasattr(modeling_prunesid, name) for name in promised)
    assert sorted(modeling_prunesid.__all__) == sorted(set(modeling_prunesid.__all__))


@pytest.mark.contract
def test_every_exported_name_is_there():
    assert all(hasattr(modeling_prunesid, name) for name in modeling_prunesid.__all__)


def overridden(method):
    """`method` of each of our classes, and of the stock class that it extends."""
    for prefix, family in [
        *(("PruneSID", family) for family in FAMILIES),
        ("ViTCoP", "Llava"),
        ("LayerPruned", "Llava"),
    ]:
        for part in ("Model", "ForConditionalGeneration"):
            stock = getattr(modeling_prunesid if family == "MiniGemini" else transformers, family + part)
            if hasattr(stock, method):
                ours = getattr(modeling_prunesid, prefix + family + part)
                yield pytest.param(getattr(ours, method), getattr(stock, method), id=f"{ours.__name__}.{method}")


@pytest.mark.parametrize(
    "ours, stock",
    [*overridden("forward"), *overridden("get_image_features"), *overridden("get_video_features")],
)
def test_arguments_are_upstreams_in_upstreams_order(ours, stock):
    own, expected = inspect.signature(ours).parameters, inspect.signature(stock).parameters
    assert [name for name in own if name in expected] == list(expected)
    # What upstream requires may have a second name in ours.
    assert all(theirs.default in (theirs.empty, own[name].default) for name, theirs in expected.items())
    # Ours must take what any promised version of Transformers takes.
    both_names = {"pixel_values", "pixel_values_images"} if "VideoLlava" in ours.__qualname__ else set()
    assert OURS in own
    assert set(own) - set(expected) <= {OURS, "image_sizes", "visual_groups", "visual_counts"} | both_names


@pytest.mark.parametrize("ours, stock", [*overridden("forward")])
def test_forward_takes_by_place_what_upstream_does(ours, stock):
    def by_place(method):
        parameters = inspect.signature(method).parameters.values()
        return [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    assert by_place(ours) == by_place(stock)


def test_generate_takes_upstreams_arguments_by_place_and_all_others_by_name():
    own = names_of(PruneSIDLlavaForConditionalGeneration.generate)
    assert own == names_of(LlavaForConditionalGeneration.generate)[: len(own)]
    assert own[-1] == "streamer"


def test_the_arguments_of_select_tokens():
    assert names_of(select_tokens) == [
        "hidden_states",
        "budget",
        "cls_attention",
        "projected",
        "num_groups",
        "nms_lambda",
        "score",
        "center",
        "quota",
        "grouping",
        "seed",
        "extra_kept",
        "return_details",
    ]


def test_auto_classes_know_ours():
    config = PruneSIDLlavaConfig()
    assert type(AutoConfig.for_model("prunesid_llava")) is PruneSIDLlavaConfig
    assert AutoModelForImageTextToText._model_mapping[type(config)] is PruneSIDLlavaForConditionalGeneration
    assert AutoModelForMultimodalLM._model_mapping[type(config)] is PruneSIDLlavaForConditionalGeneration
    assert issubclass(AutoModel._model_mapping[type(config)], PruneSIDLlavaModel)


@pytest.mark.parametrize(
    "table", ["MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"]
)
def test_pipelines_and_serving_find_the_class_by_name(table):
    assert getattr(modeling_auto, table)["prunesid_llava"] == "PruneSIDLlavaForConditionalGeneration"


def test_our_classes_are_the_stock_ones_and_more():
    assert issubclass(PruneSIDLlavaForConditionalGeneration, LlavaForConditionalGeneration)
    assert issubclass(PruneSIDLlavaModel, LlavaModel)
    assert PruneSIDLlavaForConditionalGeneration.config_class is PruneSIDLlavaConfig


def test_files_take_only_public_names_from_each_other():
    for file in Path(modeling_prunesid.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert not [name.name for name in node.names if name.name.startswith("_")], file.name


def test_no_test_module_imports_another():
    """What several share has a module of its own, so that one is changed, run and read without the other."""
    for file in Path(__file__).parent.glob("*.py"):
        assert not re.search(r"^ *(from|import) (.*[ .])?test_", file.read_text(), re.MULTILINE), file.name
