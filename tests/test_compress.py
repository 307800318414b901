"""`compress` on stock models that are loaded already: the same answers as of the class that is loaded as ours."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from oracle_family import build as build_row
from oracle_family import prompt as oracle_prompt_of
from peft import LoraConfig, get_peft_model
from tiny import BUDGET, NUM_PATCHES, batch, pixels, prompt
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    GotOcr2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaModel,
    PPChart2TableConfig,
)

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaModel, compress


GREEDY = {"do_sample": False, "max_new_tokens": 6}


def inputs():
    rows = [prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES, NUM_PATCHES], [9])]
    return {**batch(rows), "pixel_values": pixels(3)}


def test_it_answers_as_our_class(ours, stock):
    expected = ours.generate(**inputs(), **GREEDY)
    assert compress(stock, budget=BUDGET) is stock
    assert type(stock) is PruneSIDLlavaForConditionalGeneration and type(stock.model) is PruneSIDLlavaModel
    assert torch.equal(stock.generate(**inputs(), **GREEDY), expected)
    assert stock.config.prunesid_config.budget == BUDGET


def test_none_gives_the_stock_model_back(stock):
    expected = stock(**inputs()).logits
    config = stock.config.to_dict()
    compress(stock, budget=BUDGET, nms_lambda="auto")
    assert not torch.equal(stock(**inputs()).logits, expected)
    compress(stock, budget=None)
    assert type(stock) is LlavaForConditionalGeneration and type(stock.model) is LlavaModel
    assert torch.equal(stock(**inputs()).logits, expected)
    assert stock.config.to_dict() == config
    compress(stock, budget=None)


def test_a_loaded_variant_is_stock_and_pruned_again(ours, tmp_path):
    """Its configuration was read from a file, with a model type of its own."""
    ours.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    compress(model, budget=None)
    assert type(model) is LlavaForConditionalGeneration and model.config.model_type == "llava"
    compress(model, budget=BUDGET)
    assert torch.equal(model.generate(**inputs(), **GREEDY), ours.generate(**inputs(), **GREEDY))


@torch.no_grad()
def test_a_family_with_the_classes_of_another_keeps_its_configuration():
    ours, _, row = build_row("pp_chart2table")
    model, config_class = copy.deepcopy(ours), type(ours.config)
    compress(model, budget=None)
    assert type(model) is GotOcr2ForConditionalGeneration and type(model.config) is PPChart2TableConfig
    compress(model, budget=row.budget, **row.settings)
    assert type(model) is row.head and type(model.config) is config_class
    assert torch.equal(model(**oracle_prompt_of(row)).logits, ours(**oracle_prompt_of(row)).logits)


@pytest.mark.contract
@pytest.mark.parametrize("name", ["llama4", "nemotron_h_omni"])
@torch.no_grad()
def test_a_stock_model_in_one_class(name):
    ours, reference, row = build_row(name)
    stock, inputs = copy.deepcopy(reference), oracle_prompt_of(row)
    expected = ours(**inputs).logits
    compress(stock, budget=row.budget, **row.settings)
    assert type(stock) is row.head and torch.equal(stock(**inputs).logits, expected)
    compress(stock, budget=None)
    assert type(stock) is type(reference) and not hasattr(stock.config, "prunesid_config")


def test_again_with_other_settings(ours, stock):
    compress(stock, budget=5)
    compress(stock, budget=BUDGET)
    assert torch.equal(stock.generate(**inputs(), **GREEDY), ours.generate(**inputs(), **GREEDY))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks by the old name
def test_a_model_with_an_adapter(ours, stock):
    adapted = []
    for model in (ours, stock):
        torch.manual_seed(3)
        adapted.append(get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)))
    assert compress(adapted[1], budget=BUDGET) is adapted[1]
    assert torch.equal(adapted[1].generate(**inputs(), **GREEDY), adapted[0].generate(**inputs(), **GREEDY))


@pytest.mark.parametrize("place", [lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True), cpu_offload])
def test_a_model_that_accelerate_has_placed(ours, stock, place):
    expected = ours.generate(**inputs(), **GREEDY)
    place(stock)
    before = stock(**inputs()).logits
    compress(stock, budget=BUDGET)
    assert torch.equal(stock.generate(**inputs(), **GREEDY), expected)
    compress(stock, budget=None)
    assert torch.equal(stock(**inputs()).logits, before)


def test_copies_and_folders(ours, stock, tmp_path):
    expected = ours.generate(**inputs(), **GREEDY)
    compress(stock, budget=BUDGET)
    assert torch.equal(copy.deepcopy(stock).generate(**inputs(), **GREEDY), expected)
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is PruneSIDLlavaForConditionalGeneration
    assert torch.equal(loaded.generate(**inputs(), **GREEDY), expected)


def test_the_first_call_says_what_is_kept(stock, caplog, monkeypatch):
    monkeypatch.setattr(__import__("logging").getLogger("transformers"), "propagate", True)
    messages = []
    monkeypatch.setattr("modeling_prunesid.family.logger.warning", messages.append)
    compress(stock, budget=BUDGET)
    for _ in range(2):
        stock.get_image_features(pixels(1))
    assert messages == [f"PruneSID keeps {BUDGET} of {NUM_PATCHES} visual tokens of the first image."]


def test_other_models_and_settings_are_refused(stock):
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config=tiny, vision_config=tiny))
    for model in (clip, stock.model, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=f"declared family.*got {type(model).__name__}"):
            compress(model)
    for settings, message in (({"budget": 0}, "budget must be"), ({"groups": 3}, "no field 'groups'")):
        with pytest.raises(ValueError, match=message):
            compress(stock, **settings)
    with pytest.raises(ValueError, match="takes no settings"):
        compress(stock, budget=None, num_groups=3)
    assert type(stock) is LlavaForConditionalGeneration and type(stock.model) is LlavaModel
    assert not hasattr(stock.config, "prunesid_config")
