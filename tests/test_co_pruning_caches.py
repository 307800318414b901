"""Caches whose layers hold different columns: every kind and way of decoding answers as a run without a cache."""

import copy

import pytest
import torch
from tiny import IMAGE, NUM_PATCHES, batch, build, build_layer_pruned, pixels, prompt, stock_twin
from tiny_vitcop import build_vitcop
from transformers import CompileConfig, DynamicCache, StaticCache

from modeling_prunesid.upstream import CACHE_NAME, cache_of


GREEDY = {"max_new_tokens": 5, "do_sample": False}
ROWS = [prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES] * 2, [9, 10, 11, 12]), prompt([], [13, 14, 15])]
DECODING = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}


@pytest.fixture(scope="module", params=["vitcop", "llm_budget"])
def model(request):
    if request.param == "vitcop":
        return build_vitcop()
    return build_layer_pruned(12, 8, text={"num_hidden_layers": 8})


@pytest.fixture
def inputs():
    return {**batch(ROWS), "pixel_values": pixels(3)}


@pytest.fixture
def one():
    return {"input_ids": torch.tensor(ROWS[:1]), "pixel_values": pixels(1)}


def answer(model, inputs, **settings):
    torch.manual_seed(3)
    return model.generate(**inputs, **{**GREEDY, **settings})


@pytest.mark.parametrize("decoding", DECODING)
def test_every_cache_answers_as_none(model, inputs, decoding):
    settings = DECODING[decoding]
    stock = stock_twin(build(12, text={"num_hidden_layers": 8}))
    answers = [answer(stock, inputs, **settings, use_cache=use_cache) for use_cache in (False, True)]
    # The stock beams of 5.18 need a cache: without one they answer something else.
    expected = answer(model, inputs, **settings, use_cache=not torch.equal(*answers))
    for implementation in ("dynamic", "static"):
        assert torch.equal(answer(model, inputs, **settings, cache_implementation=implementation), expected)
    if decoding != "greedy":
        assert not torch.equal(expected[::2], answer(model, inputs))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_the_callers_own_cache_holds_what_is_left(model, one, cache_class):
    room = {"max_cache_len": 90} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config.text_config, **room)
    with torch.no_grad():
        counts = model(**one, **{CACHE_NAME: cache}).layer_visual_tokens[0]
    assert counts[-1] < counts[0]
    words = len(ROWS[0]) - NUM_PATCHES
    assert [int(cache.get_seq_length(layer)) for layer in range(len(counts))] == (counts + words).tolist()


def test_an_emptied_cache_is_as_a_new_one(model, one):
    text = {"input_ids": torch.arange(10, 60)[None]}
    caches = [StaticCache(config=model.config.text_config, max_cache_len=90) for _ in range(2)]
    with torch.no_grad():
        model(**one, **{CACHE_NAME: caches[0]})
        caches[0].reset()
        for cache in caches:
            model(**text, **{CACHE_NAME: cache})
        first, second = (model(torch.tensor([[7]]), **{CACHE_NAME: cache}).logits for cache in caches)
    assert torch.equal(first, second)


@pytest.mark.parametrize("repeated", [False, True], ids=["the new image", "all images"])
def test_a_second_image_in_every_row_of_a_conversation(model, repeated):
    """The rows ask about one image each, then about another one, on the cache of the first answers."""
    images = pixels(4)
    first = {**batch([ROWS[0], prompt([NUM_PATCHES], [9, 10, 11])]), "pixel_values": images[:2]}
    start = answer(model, first, return_dict_in_generate=True)
    turn = torch.tensor([[20, *[IMAGE] * NUM_PATCHES, 21], [22, *[IMAGE] * NUM_PATCHES, 23]])
    chat = torch.cat([start.sequences, turn], dim=1)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, chat.shape[1] - first["input_ids"].shape[1]), value=1)
    by_row = images[[0, 2, 1, 3]]  # the views of a conversation are ordered by row
    given = by_row if repeated else images[2:]
    found = answer(
        model,
        {"input_ids": chat, "attention_mask": mask, "pixel_values": given},
        **{CACHE_NAME: cache_of(start)},
    )
    whole = {"input_ids": chat, "attention_mask": mask, "pixel_values": by_row}
    assert torch.equal(found, answer(model, whole, use_cache=False))


def test_an_output_that_is_a_tuple_leaves_the_cache_as_usable(model, one):
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for cache, return_dict in zip(caches, (True, False)):
            model.model(**one, **{CACHE_NAME: cache}, return_dict=return_dict)
        first, second = (model(torch.tensor([[7]]), **{CACHE_NAME: cache}).logits for cache in caches)
    assert torch.equal(first, second)


def test_a_compile_config_leaves_the_answer_and_nothing_is_compiled(model, one):
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config, "return_dict_in_generate": True}
    first = answer(model, one, **settings)
    assert torch.equal(first.sequences, answer(model, one))
    chat = torch.cat([first.sequences, torch.tensor([[20, 21]])], dim=1)
    cache = StaticCache(config=model.config.text_config, max_cache_len=200)
    answer(model, one, **{CACHE_NAME: cache})
    follow_up = answer(model, {"input_ids": chat}, **{CACHE_NAME: cache}, compile_config=config)
    assert torch.equal(follow_up, answer(model, {**one, "input_ids": chat}))
    assert not hasattr(model, "_compiled_call")


@pytest.mark.contract
def test_a_compiled_forward_gives_the_same_logits(one):
    torch.compiler.reset()
    model = build_vitcop()
    with torch.no_grad():
        expected = model(**one)
        found = torch.compile(model, backend="eager")(**one)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.layer_visual_tokens, expected.layer_visual_tokens)
    torch.compiler.reset()


def test_an_assistant_gives_the_greedy_answer(model, one):
    assert torch.equal(answer(model, one, assistant_model=copy.deepcopy(model)), answer(model, one))


@pytest.mark.parametrize("label", ["llm_budget", "vitcop"])
def test_a_stock_assistant_proposes_what_the_model_answers(label):
    model = build_vitcop() if label == "vitcop" else build_layer_pruned(16, 8, text={"num_hidden_layers": 4})
    inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7, 8, 9])]), "pixel_values": pixels(1)}
    assistant = stock_twin(build())
    assert torch.equal(answer(model, inputs, assistant_model=assistant), answer(model, inputs))
