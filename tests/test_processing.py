"""The processor writes N placeholders for an image, tells the model N, and is the stock one otherwise."""

import json

import pytest
import torch
from tiny import BUDGET, IMAGE, NUM_PATCHES, build
from tiny_checkpoint import build_processor, picture
from tiny_processor import ask, build_ours, check_what_is_set_is_obeyed, count
from transformers import AutoProcessor, LlavaProcessor

from modeling_prunesid import PruneSIDLlavaProcessor


GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("budget, expected", [(8, 8), (1, 1), (0.5, 25), (49, 49), (64, 49), (1.0, 49), (None, 49)])
def test_the_budget_is_the_number_of_placeholders(budget, expected):
    processor = build_ours(budget)
    assert count(ask(processor, 2)) == [2 * expected]
    assert processor._get_num_multimodal_tokens(image_sizes=[(28, 28), (400, 30)]).num_image_tokens == [expected] * 2


@pytest.mark.parametrize("budget, expected", [(3, 3), (0.25, 12), (1.0, 49)])
def test_a_call_may_have_its_own_budget(budget, expected):
    for processor in (build_ours(), build_ours(None)):
        inputs = ask(processor, 2, num_visual_tokens=budget)
        assert count(inputs) == [2 * expected]
        assert inputs["num_visual_tokens"].tolist() == [expected] * 2
        nested = ask(processor, 2, images_kwargs={"num_visual_tokens": budget})
        assert torch.equal(nested["input_ids"], inputs["input_ids"])
        counted = processor._get_num_multimodal_tokens(image_sizes=[(28, 28)], num_visual_tokens=budget)
        assert counted.num_image_tokens == [expected]


def test_the_count_of_each_image_is_returned():
    counts = ask(build_ours(), 3)["num_visual_tokens"]
    assert counts.tolist() == [BUDGET] * 3
    assert counts.dtype == torch.long


def test_without_a_budget_it_is_the_stock_processor():
    got, expected = ask(build_ours(None), 2), ask(build_processor(), 2)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_full_prompts_are_asked_for_by_name(ours, tmp_path):
    stock, full = ask(build_processor(), 2), build_ours("full")
    full.save_pretrained(tmp_path / "full")
    build_ours().save_pretrained(tmp_path / "short")
    set_later = build_ours()
    set_later.num_visual_tokens = "full"
    set_later.save_pretrained(tmp_path / "later")
    load = PruneSIDLlavaProcessor.from_pretrained
    for got in (
        ask(full, 2),
        ask(set_later, 2),
        ask(build_ours(), 2, num_visual_tokens="full"),
        ask(build_ours(), 2, images_kwargs={"num_visual_tokens": "full"}),
        ask(load(tmp_path / "full"), 2),
        ask(load(tmp_path / "later"), 2),
        ask(load(tmp_path / "short", num_visual_tokens="full"), 2),
    ):
        assert got.keys() == stock.keys()
        assert all(torch.equal(got[name], stock[name]) for name in stock)
        assert count({"input_ids": ours.generate(**got, num_visual_tokens=3, max_new_tokens=1)}) == [2 * NUM_PATCHES]
    assert count(ask(set_later, num_visual_tokens=5)) == [5]
    counted = build_ours()._get_num_multimodal_tokens(image_sizes=[(28, 28)], num_visual_tokens="full")
    assert counted.num_image_tokens == [NUM_PATCHES]


def test_text_alone():
    inputs = ask(build_ours(), 0)
    assert torch.equal(inputs["input_ids"], ask(build_processor(), 0)["input_ids"])
    assert "pixel_values" not in inputs and "num_visual_tokens" not in inputs


def test_a_padded_batch_with_several_images_a_row():
    processor = build_ours()
    processor.tokenizer.padding_side = "left"
    texts = ["<image> word7 <image> word9", "word3 word4", "word5 <image>"]
    inputs = processor(
        images=[[picture(0), picture(1)], [], [picture(2)]], text=texts, padding=True, return_tensors="pt"
    )
    assert count(inputs) == [2 * BUDGET, 0, BUDGET]
    assert inputs["num_visual_tokens"].tolist() == [BUDGET] * 3
    assert len(inputs["pixel_values"]) == 3


def test_a_chat():
    processor = build_ours()
    assert processor.chat_template == build_processor().chat_template
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "word7"}]}]
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **kwargs)
    assert count(inputs) == [BUDGET]
    assert inputs["num_visual_tokens"].tolist() == [BUDGET]
    own = processor.apply_chat_template(chat, **kwargs, processor_kwargs={"images_kwargs": {"num_visual_tokens": 5}})
    assert count(own) == [5]


def test_every_input_of_the_model_is_named():
    processor = build_ours()
    assert set(ask(processor)) <= set(processor.model_input_names)


def test_token_types_mark_the_placeholders():
    inputs = ask(build_ours(), 2, return_mm_token_type_ids=True)
    assert torch.equal(torch.as_tensor(inputs["mm_token_type_ids"]).bool(), inputs["input_ids"] == IMAGE)


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, float("nan")])
def test_an_invalid_budget(value):
    with pytest.raises(ValueError, match="num_visual_tokens must be a positive integer") as error:
        build_ours(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_an_invalid_budget_of_a_call(value):
    with pytest.raises(ValueError, match="num_visual_tokens must be a positive integer"):
        ask(build_ours(), num_visual_tokens=value)


def test_it_is_saved_with_its_budget(tmp_path):
    build_ours(0.25).save_pretrained(tmp_path)
    for loaded in (PruneSIDLlavaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is PruneSIDLlavaProcessor
        assert loaded.num_visual_tokens == 0.25
        assert count(ask(loaded)) == [12]
        assert loaded.chat_template == build_processor().chat_template
    changed = PruneSIDLlavaProcessor.from_pretrained(tmp_path, num_visual_tokens=5)
    assert count(ask(changed)) == [5]


def test_what_is_set_later_is_obeyed(tmp_path):
    check_what_is_set_is_obeyed(build_ours(), tmp_path, lambda processor: ask(processor, 2))


def test_a_number_that_an_earlier_version_left_in_the_tokenizer(tmp_path):
    build_ours().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_visual_tokens": 7}))
    assert count(ask(PruneSIDLlavaProcessor.from_pretrained(tmp_path))) == [BUDGET]


def test_a_thin_variant_obeys_as_well(tmp_path):
    build_processor().save_pretrained(tmp_path / "base")
    (tmp_path / "thin").mkdir()
    fields = {"num_visual_tokens": 7, "base_model_name_or_path": str(tmp_path / "base"), "base_model_revision": None}
    (tmp_path / "thin" / "processor_config.json").write_text(json.dumps(fields))
    loaded = PruneSIDLlavaProcessor.from_pretrained(tmp_path / "thin")
    assert count(ask(loaded)) == [7]
    for value, expected in ((3, 3), (None, NUM_PATCHES)):
        loaded.num_visual_tokens = value
        assert count(ask(loaded)) == [expected]


def test_a_stock_processor_folder_loads(tmp_path):
    build_processor().save_pretrained(tmp_path)
    loaded = PruneSIDLlavaProcessor.from_pretrained(tmp_path, num_visual_tokens=BUDGET)
    assert count(ask(loaded)) == [BUDGET]


def test_the_model_obeys_the_processor(ours):
    """The budget of the configuration is a fallback."""
    processor = build_ours()
    for budget in (3, 20, 0.5):
        inputs = ask(processor, 2, num_visual_tokens=budget)
        full = ask(build_processor(), 2)
        got = ours.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        expected = ours.generate(**full, num_visual_tokens=budget, **GREEDY)[:, full["input_ids"].shape[1] :]
        assert torch.equal(got, expected)
        assert ours(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    off = ask(processor, 2, num_visual_tokens=1.0)
    assert count(off) == [2 * NUM_PATCHES]
    assert ours(**off).logits.shape[1] == off["input_ids"].shape[1]


def test_full_prompts_of_the_stock_processor_get_the_same_answer(ours):
    short, full = ask(build_ours(), 2), ask(build_processor(), 2)
    answers = [ours.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :] for inputs in (short, full)]
    assert torch.equal(*answers)


def test_even_the_stock_processor_can_write_short_prompts(ours):
    stock = build_processor()
    stock.num_additional_image_tokens = BUDGET - NUM_PATCHES + 1
    assert type(stock) is LlavaProcessor
    inputs = ask(stock, 2)
    assert count(inputs) == [2 * BUDGET]
    assert torch.equal(ours.generate(**inputs, **GREEDY), ours.generate(**ask(build_ours(), 2), **GREEDY))


def test_a_dynamic_model_gets_full_prompts():
    model = build(dynamic=True, reference_information=0.6)
    arguments = PruneSIDLlavaProcessor.arguments_for(model.config.prunesid_config)
    assert arguments["num_visual_tokens"] is None
    inputs = ask(build_ours(**arguments), 2)
    assert count(inputs) == [2 * NUM_PATCHES]
    counts = {len(kept) for kept in model.get_image_features(inputs["pixel_values"]).keep_indices}
    assert model(**inputs).keep_mask.sum() < inputs["input_ids"].shape[1] and counts != {BUDGET}
