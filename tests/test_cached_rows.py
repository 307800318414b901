"""Caches whose rows a caller reorders, selects or repeats go on as if they had been filled by these rows."""

import copy
import gc
import pickle
import weakref

import pytest
import tiny_qwen
import torch
from tiny import NUM_PATCHES, batch, build, build_layer_pruned, pixels, prompt
from tiny_vitcop import build_vitcop
from transformers import DynamicCache

from modeling_prunesid.upstream import CACHE_NAME, cache_of


ROWS = [prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES] * 2, [9, 10, 11]), prompt([], [13, 14])]
PICTURES = [[0], [1, 2], []]
MOVES = {
    "reordered": ("reorder_cache", torch.tensor([2, 0, 1]), [2, 0, 1]),
    "selected": ("batch_select_indices", torch.tensor([1]), [1]),
    "selected by a mask": ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
    "repeated": ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    "reordered with a row twice": ("reorder_cache", torch.tensor([1, 0, 1]), [1, 0, 1]),
}
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def llava_turns(model):
    first = batch(ROWS)
    views = pixels(3)

    def begin(rows):
        seen = [view for row in rows for view in PICTURES[row]]
        inputs = {name: value[rows] for name, value in first.items()}
        return {**inputs, "pixel_values": views[seen]}

    return model, begin


def qwen_turns(model):
    grids = [[(1, 4, 12)], [(1, 8, 12), (1, 4, 12)], []]
    parts = [[5, *[("image", grid) for grid in row], 7, 8] for row in grids]
    first = tiny_qwen.batch("Qwen2_5_VL", *[tiny_qwen.prompt("Qwen2_5_VL", *row) for row in parts])

    def begin(rows):
        inputs = {name: first[name][rows] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        seen = [(grid, row) for row in rows for grid in grids[row]]
        inputs["pixel_values"] = torch.cat([tiny_qwen.pixels([grid], seed) for grid, seed in seen]).double()
        inputs["image_grid_thw"] = torch.tensor([grid for grid, _ in seen])
        return inputs

    return model, begin


MODELS = {
    "LLaVA": lambda: llava_turns(build()),
    "Qwen-VL": lambda: qwen_turns(tiny_qwen.build("Qwen2_5_VL", budget=0.25)),
    "ViTCoP": lambda: llava_turns(build_vitcop()),
    "llm_budget": lambda: llava_turns(build_layer_pruned(12, 8, text={"num_hidden_layers": 8})),
}


@pytest.fixture(scope="module", params=MODELS)
def turns(request):
    return MODELS[request.param]()


@torch.no_grad()
def fill(model, first, call="forward", **settings):
    """A cache that a first turn filled."""
    cache = DynamicCache()
    if call == "generate":  # which counts no padding, unlike `forward`
        return cache_of(
            model.generate(**first, max_new_tokens=1, **settings, return_dict_in_generate=True, **{CACHE_NAME: cache})
        )
    model(**first, **{CACHE_NAME: cache})
    return cache


@torch.no_grad()
def go_on(model, first, cache, call):
    """What follows a first turn: logits of more words, of a word, or an answer."""
    words = torch.tensor([[6, 12, 9], [7, 5, 8], [11, 6, 5]])[:1].expand(len(first["input_ids"]), -1)
    words = words[:, :1] if call == "step" else words
    if call == "generate":
        ids = torch.cat([first["input_ids"], words], dim=1)
        mask = torch.nn.functional.pad(first["attention_mask"], (0, words.shape[1]), value=1)
        given = {**first, "input_ids": ids, "attention_mask": mask, CACHE_NAME: cache}
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, words.shape[1]))
        output = model.generate(**given, **GREEDY, output_logits=True, return_dict_in_generate=True)
        return torch.stack(output.logits)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, words.shape[1]), value=1)
    return model(input_ids=words, attention_mask=mask, **{CACHE_NAME: cache}).logits


@pytest.mark.parametrize("call", ["forward", "step", "generate"])
@pytest.mark.parametrize("move", MOVES)
def test_rows_that_a_caller_moves(turns, move, call):
    model, begin = turns
    method, how, rows = MOVES[move]
    moved, expected = (fill(model, begin(own), call) for own in ([0, 1, 2], rows))
    getattr(moved, method)(how)
    expected = go_on(model, begin(rows), expected, call)
    # Other paddings are other positions, whose rotary angles are rounded to float32.
    torch.testing.assert_close(go_on(model, begin(rows), moved, call), expected, rtol=1e-4, atol=1e-4)


def moved_in_turn(model, begin, change=lambda cache: cache):
    """Three moves, with a step between the first two, and a copy or the like before the last."""
    cache = fill(model, begin([0, 1, 2]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    first = begin([2, 0, 1])
    go_on(model, first, cache, "step")
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache = change(cache)
    cache.reorder_cache(beam_idx=torch.tensor([1, 0]))
    first = begin([1, 2])
    first["input_ids"] = torch.cat([first["input_ids"], torch.tensor([[6], [6]])], dim=1)
    first["attention_mask"] = torch.nn.functional.pad(first["attention_mask"], (0, 1), value=1)
    return go_on(model, first, cache, "forward")


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["copied", "copied with its layers", "pickled"],
)
def test_moves_one_after_the_other(turns, change):
    model, begin = turns
    cache = fill(model, begin([1, 2]))
    go_on(model, begin([1, 2]), cache, "step")
    first = begin([1, 2])
    first["attention_mask"] = torch.nn.functional.pad(first["attention_mask"], (0, 1), value=1)
    expected = go_on(model, first, cache, "forward")
    torch.testing.assert_close(moved_in_turn(model, begin, change), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_and_its_original_move_apart(turns):
    model, begin = turns
    cache = fill(model, begin([0, 1, 2]))
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 2, 0]))
    expected = go_on(model, begin([0, 1, 2]), copy.deepcopy(cache), "forward")
    torch.testing.assert_close(go_on(model, begin([0, 1, 2]), cache, "forward"), expected)
    torch.testing.assert_close(go_on(model, begin([1, 2, 0]), twin, "forward"), expected[[1, 2, 0]])


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1]])
def test_beams_of_a_cache_go_on(order):
    """The cache of beams has several rows of each prompt, of which a caller may keep one each."""
    model, begin = llava_turns(build())
    cache = fill(model, begin([0, 1]), "generate", num_beams=3)
    cache.batch_select_indices(torch.tensor([3 * row + 1 for row in order]))
    expected = fill(model, begin(order), "generate")
    expected = go_on(model, begin(order), expected, "generate")
    torch.testing.assert_close(go_on(model, begin(order), cache, "generate"), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_repeated_by_hand_goes_on_with_beams():
    model, begin = qwen_turns(tiny_qwen.build("Qwen2_5_VL", budget=0.25))
    first, settings = begin([0, 1]), {"num_beams": 3, **GREEDY}
    cache, words = fill(model, first, "generate"), torch.tensor([[6, 12, 9, 8], [6, 12, 9, 8]])
    cache.batch_repeat_interleave(3)
    whole = {**first, "input_ids": torch.cat([first["input_ids"], words], dim=1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        whole[name] = torch.nn.functional.pad(first[name], (0, words.shape[1]), value=value)
    expected = model.generate(**whole, **settings)
    assert torch.equal(model.generate(**whole, **settings, **{CACHE_NAME: cache}), expected)


def test_a_cache_is_freed_at_once():
    model, begin = llava_turns(build())
    cache = fill(model, begin([0, 1]))
    cache.reorder_cache(torch.tensor([1, 0]))
    layer = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()
