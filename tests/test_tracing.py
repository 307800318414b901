"""`torch.compile(fullgraph=True)` and `torch.export` of `forward`: short prompts of our processor, and full ones."""

import pytest
import torch
from tiny import BUDGET, NUM_PATCHES, batch, build, pixels, prompt
from tiny_checkpoint import build_processor, picture

from modeling_prunesid import PruneSIDLlavaProcessor


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def ours():
    """Every layer is traced by itself, so that there are no more of them than are told apart."""
    return build(vision={"num_hidden_layers": 2}, text={"num_hidden_layers": 1})


@pytest.fixture(autouse=True)
def _anew():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def full_prompts(*rows):
    """Rows of `[number of images, words...]`."""
    ids = [prompt([NUM_PATCHES] * images, words) for images, *words in rows]
    return {**batch(ids), "pixel_values": pixels(sum(images for images, *_ in rows))}


def short_prompts(num_visual_tokens=BUDGET):
    """What our processor returns for two rows of one and two images: counts and a mask included."""
    stock = build_processor()
    processor = PruneSIDLlavaProcessor(
        stock.image_processor,
        stock.tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        num_visual_tokens=num_visual_tokens,
    )
    processor.tokenizer.padding_side = "left"
    texts = ["word7 <image> word9", "<image> word7 <image> word11 word8"]
    images = [[picture(0)], [picture(1), picture(2)]]
    inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
    assert {"attention_mask", "num_visual_tokens"} <= inputs.keys()
    return inputs


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def test_short_prompts_compile_to_one_graph(ours):
    inputs = short_prompts()
    assert torch.equal(compiled(ours)(**inputs).logits, ours(**inputs).logits)


@pytest.mark.contract
def test_short_prompts_are_exported(ours):
    inputs = {**short_prompts(), "use_cache": False}
    exported = torch.export.export(ours, (), inputs, strict=False).module()
    assert torch.equal(exported(**inputs).logits, ours(**inputs).logits)


@pytest.mark.contract
def test_a_graph_refuses_another_budget_than_it_was_traced_for(ours):
    inputs = short_prompts(num_visual_tokens=5)
    with pytest.raises(Exception, match="num_visual_tokens must be .*prunesid_config.budget=8"):
        compiled(ours)(**inputs)


@pytest.mark.contract
def test_full_prompts_of_equal_numbers_of_images_compile_to_one_graph(ours):
    graph = compiled(ours)
    for rows in ([[1, 7], [1, 7, 8, 9]], [[2, 7, 8], [2, 9]]):
        inputs = full_prompts(*rows)
        got, expected, is_token = graph(**inputs), ours(**inputs), inputs["attention_mask"].bool()
        assert torch.equal(got.logits[is_token], expected.logits[is_token])
        assert torch.equal(got.keep_mask[is_token], expected.keep_mask[is_token])


@pytest.mark.contract
@pytest.mark.parametrize("rows", [[[1, 7], [2, 8]], [[1, 7], [3, 8]]], ids=["at once", "in the graph"])
def test_full_prompts_of_other_numbers_of_images_are_refused_by_name(ours, rows):
    inputs = full_prompts(*rows)
    with pytest.raises(Exception, match=r"each row must have as many images.*num_visual_tokens"):
        compiled(ours)(**inputs)
