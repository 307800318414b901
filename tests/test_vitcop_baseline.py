"""ViTCoP, and PruneSID with `llm_budget`, as methods of the comparison: the published classes, measured."""

import pytest
import torch
from tiny import IMAGE, NUM_PATCHES, batch, build, pixels, prompt, stock_fields

from modeling_prunesid import (
    LayerPrunedLlavaConfig,
    LayerPrunedLlavaForConditionalGeneration,
    ViTCoPLlavaConfig,
    ViTCoPLlavaForConditionalGeneration,
)
from prunesid_cli.baselines import applied
from prunesid_cli.evaluate import repeat_views


BUDGET = 12
NAMES = ("vitcop", "prunesid-llm")
TOWERS = {"clip": {}, "dinov2": {"model_type": "dinov2"}}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
ROWS = [prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES] * 2, [9, 10, 11]), prompt([], [13, 14, 15])]


@pytest.fixture(params=TOWERS)
def model(request):
    return build(None, vision=TOWERS[request.param], text={"num_hidden_layers": 4})


def published(model, name):
    """The class that a user would load the same weights with, set to the budget."""
    fields = stock_fields(model.config)
    if name == "vitcop":
        twin = ViTCoPLlavaForConditionalGeneration(ViTCoPLlavaConfig(**fields, vitcop_config={"budget": BUDGET}))
    else:
        settings = {"budget": BUDGET + BUDGET // 2, "llm_budget": BUDGET, "nms_lambda": "auto"}
        twin = LayerPrunedLlavaForConditionalGeneration(LayerPrunedLlavaConfig(**fields, prunesid_config=settings))
    twin.to(model.dtype).load_state_dict(model.state_dict())
    return twin.eval()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_published_class(model, name):
    inputs = {**batch(ROWS), "pixel_values": pixels(3)}
    with torch.no_grad(), applied(model, name, BUDGET) as run:
        found, answer = model(**inputs), model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        twin = published(model, name)
        expected = twin(**inputs)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.layer_visual_tokens, expected.layer_visual_tokens)
        assert torch.equal(answer, twin.generate(**inputs, **GREEDY))
    first, second, _ = expected.layer_visual_tokens.float().mean(1).tolist()
    assert run.tokens == [first, second / 2, second / 2] * 2
    assert BUDGET - 1 < run.measured_tokens < BUDGET + 1


@pytest.mark.parametrize("name", NAMES)
def test_features_encoded_once_answer_every_question(model, name):
    """As the evaluation asks: each picture is encoded once, and its features repeated for all its questions."""
    questions = batch([prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES], [9, 10, 11]), ROWS[0]])
    images, rows = pixels(2), [0, 0, 1]
    with applied(model, name, BUDGET):
        expected = model.generate(**questions, pixel_values=images[rows], **GREEDY)
        encoded = model.get_image_features(pixel_values=images, return_dict=True)
        found = model.generate(**questions, mm_encoder_outputs={"image": repeat_views(encoded, rows)}, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_layers", [4, 12, 32])
@pytest.mark.parametrize("name", NAMES)
def test_the_measured_mean_is_the_budget(name, num_layers):
    side, patches = 96, 576
    text = {"num_hidden_layers": num_layers, "max_position_embeddings": 1024}
    model = build(None, vision={"image_size": side, "initializer_range": 0.02}, text=text)
    generator = torch.Generator().manual_seed(num_layers)
    images = torch.randn(1, 3, side, side, generator=generator)
    ids = torch.tensor([[1, *[IMAGE] * patches, 7]])
    for budget in (288, 192, 128, 64, 32, 0.1):
        target = budget if isinstance(budget, int) else round(budget * patches)
        with torch.no_grad(), applied(model, name, budget) as run:
            model(ids, pixel_values=images)
        assert run.measured_tokens == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [1, 2, 40, NUM_PATCHES - 1])
def test_budgets_at_the_ends_are_met_within_whole_tokens(name, budget):
    model = build(None, text={"num_hidden_layers": 4})
    with torch.no_grad(), applied(model, name, budget) as run:
        model(torch.tensor(ROWS[:1]), pixel_values=pixels(1))
    assert run.measured_tokens == pytest.approx(budget, abs=0.5)
