"""Chats with a cache, prompts that could be read in two ways, and callers that read the outputs of `forward`."""

import copy

import pytest
import tiny_qwen
import torch
from tiny import BOS, BUDGET, IMAGE, NUM_PATCHES, batch, build, pixels, prompt, stock_twin
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from modeling_prunesid.upstream import CACHE_NAME


GREEDY = {"max_new_tokens": 4, "do_sample": False}
SMALL = {"image_size": 24, "patch_size": 4}  # 36 tokens


def small_pixels(count, seed=0):
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_every_picture", [True, False])
@pytest.mark.parametrize("budget", [18, 12, 9, 10])
def test_a_picture_a_turn_whatever_share_is_kept(budget, is_every_picture):
    model, cache, ids = build(budget, vision=SMALL), DynamicCache(), [BOS]
    for turn in range(4):
        ids = torch.tensor([[*ids, 5 + turn, *[IMAGE] * 36, 20 + turn, 21]])
        pictures = small_pixels(turn + 1)
        new = pictures if is_every_picture else pictures[turn:]
        answer = model.generate(ids, pixel_values=new, **{CACHE_NAME: cache}, **GREEDY)
        assert torch.equal(answer, model.generate(ids, pixel_values=pictures, **GREEDY))
        ids = answer[0].tolist()


@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_a_picture_a_turn_at_the_default_share(family):
    model, cache, ids, grid = tiny_qwen.build(family, budget=1 / 3), DynamicCache(), [], (1, 12, 12)
    for turn in range(4):
        ids = [*ids, *tiny_qwen.prompt(family, 5 + turn, ("image", grid), 20 + turn, 21)[0]]
        input_ids = torch.tensor([ids])
        inputs = {
            "input_ids": input_ids,
            "mm_token_type_ids": (input_ids == tiny_qwen.IMAGE).int(),
            "pixel_values": torch.cat([tiny_qwen.pixels([grid], seed) for seed in range(turn + 1)]),
            "image_grid_thw": torch.tensor([grid] * (turn + 1)),
        }
        answer = model.generate(**inputs, **{CACHE_NAME: cache}, **GREEDY)
        assert torch.equal(answer, model.generate(**inputs, **GREEDY))
        ids = answer[0].tolist()


def qwen_inputs(*rows, grids, seeds):
    """One row of ids, with pictures of `grids`, in float64."""
    ids = torch.tensor([[token for row in rows for token in row]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == tiny_qwen.IMAGE).int(),
        "pixel_values": torch.cat([tiny_qwen.pixels([grid], seed) for grid, seed in zip(grids, seeds)]).double(),
        "image_grid_thw": torch.tensor(grids),
    }


@pytest.mark.parametrize("passes", ["all", "new", "ids"])
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_a_picture_that_loses_tokens_behind_one_that_loses_none(family, passes):
    """Upstream places the first turn, and the second goes on behind it, whatever the model does in between."""
    model, cache, small, large = tiny_qwen.build(family, budget=0.25).double(), DynamicCache(), (1, 4, 4), (1, 8, 12)
    inputs = qwen_inputs
    first = inputs(tiny_qwen.prompt(family, 5, 7, ("image", small), 20, 21)[0], grids=[small], seeds=[0])
    ids = model.generate(**first, **{CACHE_NAME: cache}, **GREEDY)[0].tolist()
    model.generate(**inputs(tiny_qwen.prompt(family, 5, ("image", large), 9)[0], grids=[large], seeds=[3]), **GREEDY)
    new = tiny_qwen.prompt(family, 6, ("image", large), 22)[0]
    whole = inputs(ids, new, grids=[small, large], seeds=[0, 1])
    given = {"all": whole, "new": {**whole, **inputs(new, grids=[large], seeds=[1]), "input_ids": whole["input_ids"]}}
    given["new"]["mm_token_type_ids"] = whole["mm_token_type_ids"]
    start = len(ids) - 1  # the last token of an answer is not in the cache
    part = {name: whole[name][:, start:] for name in ("input_ids", "mm_token_type_ids")}
    given["ids"] = {**given["new"], **part, "attention_mask": torch.ones_like(whole["input_ids"])}
    expected = model.generate(**whole, **GREEDY)
    answer = model.generate(**given[passes], **{CACHE_NAME: cache}, **GREEDY)
    assert torch.equal(answer[0, -4:], expected[0, -4:])


@pytest.mark.parametrize("later", [1.0, 0.5])
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_another_budget_in_a_second_turn(family, later):
    """The new pictures may have it; those that the cache holds may not."""
    model, cache, grid = tiny_qwen.build(family, budget=0.25).double(), DynamicCache(), (1, 8, 12)
    first = qwen_inputs(tiny_qwen.prompt(family, 5, 7, ("image", grid), 20, 21)[0], grids=[grid], seeds=[0])
    ids = model.generate(**first, **{CACHE_NAME: cache}, **GREEDY)[0].tolist()
    new = tiny_qwen.prompt(family, 6, ("image", grid), 22)[0]
    whole = qwen_inputs(ids, new, grids=[grid, grid], seeds=[0, 1])
    tokens = tiny_qwen.tokens_of(grid)
    expected = model.generate(**whole, num_visual_tokens=[tokens // 4, int(later * tokens)], **GREEDY)
    with pytest.raises(ValueError, match="Pass the budget"):
        model.generate(**whole, num_visual_tokens=later, **{CACHE_NAME: copy.deepcopy(cache)}, **GREEDY)
    own = {name: qwen_inputs(new, grids=[grid], seeds=[1])[name] for name in ("pixel_values", "image_grid_thw")}
    answer = model.generate(**{**whole, **own}, num_visual_tokens=later, **{CACHE_NAME: cache}, **GREEDY)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("budget", [None, 1.0, 10_000, 0.25])
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_the_ids_of_a_second_turn_alone(family, budget):
    """
    Upstream places the picture of such a turn like text. Where no token is dropped, so do we, bit for bit; else the
    answer is that to the whole conversation.
    """
    ours, grid, settings = tiny_qwen.build(family, budget=budget).double(), (1, 8, 12), {"output_logits": True}
    logits = {}
    for model in (ours, tiny_qwen.stock_twin(ours, family).double()):
        cache, calls = DynamicCache(), {**GREEDY, **settings, "return_dict_in_generate": True}
        first = qwen_inputs(tiny_qwen.prompt(family, 5, 7, ("image", grid), 20, 21)[0], grids=[grid], seeds=[0])
        ids = model.generate(**first, **{CACHE_NAME: cache}, **GREEDY)[0].tolist()
        new = tiny_qwen.prompt(family, 6, ("image", grid), 22)[0]
        whole = qwen_inputs(ids, new, grids=[grid, grid], seeds=[0, 1])
        part = qwen_inputs(ids[-1:], new, grids=[grid], seeds=[1])  # the last token of an answer is not in the cache
        part["attention_mask"] = torch.ones_like(whole["input_ids"])
        logits[model] = [
            torch.stack(model.generate(**inputs, **calls).logits) for inputs in ({**part, CACHE_NAME: cache}, whole)
        ]
    (of_part, of_whole), (stock_of_part, _) = logits.values()
    if budget == 0.25:
        torch.testing.assert_close(of_part, of_whole)
    else:
        assert torch.equal(of_part, stock_of_part)


@pytest.mark.parametrize("second", [[6, *[IMAGE] * 36, 30, 31], [6, 7, 8, 9, 10, *[IMAGE] * 36, 30, 31, 32, 33]])
def test_a_cache_of_another_conversation(second):
    model, cache = build(12, vision=SMALL), DynamicCache()
    first = torch.tensor([[BOS, 5, *[IMAGE] * 36, 20, 21]])
    model.generate(first, pixel_values=small_pixels(1), **{CACHE_NAME: cache}, **GREEDY)
    with pytest.raises(ValueError, match=f"{CACHE_NAME} was filled by another prompt"):
        model.generate(
            torch.tensor([[BOS, *second]]), pixel_values=small_pixels(1, 9), **{CACHE_NAME: cache}, **GREEDY
        )


def test_a_cache_that_an_interrupted_call_left(ours):
    class Interrupts(BaseStreamer):
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt

        def end(self):
            pass

    ids, cache = torch.tensor([prompt([NUM_PATCHES], [7, 8])]), DynamicCache()
    with pytest.raises(KeyboardInterrupt):
        ours.generate(ids, pixel_values=pixels(1), streamer=Interrupts(), **{CACHE_NAME: cache}, **GREEDY)
    with pytest.raises(ValueError, match="did not finish"):
        ours.generate(ids, pixel_values=pixels(1), **{CACHE_NAME: cache}, **GREEDY)


def test_prompts_that_could_be_read_in_two_ways():
    ours, half = build(), build(18, vision=SMALL)
    cut = torch.tensor([prompt([BUDGET], [])])
    with pytest.raises(ValueError, match="Image features and image tokens do not match for certain"):
        ours(input_ids=cut, pixel_values=pixels(1))
    ours(input_ids=cut, pixel_values=pixels(1), num_visual_tokens=[BUDGET])  # as our processor says it
    run = torch.tensor([[BOS, 5, *[IMAGE] * 36, 20, 21]])
    with pytest.raises(ValueError, match="Image features and image tokens do not match for certain"):
        half(input_ids=run, pixel_values=small_pixels(2))


@torch.no_grad()
def test_the_layout_of_rl_trainers(ours):
    """Prompts padded on the left, answers on the right; each row scores as alone."""
    prompts, answers = [prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES], [7, 8, 9, 10])], [[11, 12], [11, 12, 13]]
    left = batch(prompts)
    ids = torch.cat([left["input_ids"], torch.tensor([[11, 12, 0], [11, 12, 13]])], dim=1)
    mask = torch.cat([left["attention_mask"], torch.tensor([[1, 1, 0], [1, 1, 1]])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2)}
    for positions in ({}, {"position_ids": mask.cumsum(1) - 1}):
        logits = ours(**inputs, **positions).logits[:, -4:-1]
        torch.testing.assert_close(ours(**inputs, **positions, logits_to_keep=4).logits[:, :-1], logits)
        for row, answer in enumerate(answers):
            whole = torch.tensor([prompts[row] + answer])
            alone = ours(input_ids=whole, pixel_values=pixels(2)[[row]]).logits[0, -len(answer) - 1 : -1]
            # Rotary angles of other positions are rounded to float32.
            torch.testing.assert_close(logits[row, : len(answer)], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_labels_of_placeholders_and_their_count_are_no_matter(ours):
    ids = torch.tensor([prompt([NUM_PATCHES], [7, 8, 9])])
    ignored = ids.masked_fill(ids == IMAGE, -100)
    inputs = {"input_ids": ids, "pixel_values": pixels(1)}
    expected = ours(**inputs, labels=ignored, num_items_in_batch=(ignored[:, 1:] != -100).sum()).loss
    got = ours(**inputs, labels=ids, num_items_in_batch=torch.tensor(ids[:, 1:].numel())).loss  # as Trainer counts
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    logits = ours(**inputs).logits
    outside = torch.nn.functional.cross_entropy(logits[0, :-1], ignored[0, 1:])
    torch.testing.assert_close(ours(**inputs, labels=ids).loss.double(), outside, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_masked_placeholders_stay_with_their_features(ours):
    ids = torch.tensor([[1, 7, 8, 9, 10, *[IMAGE] * NUM_PATCHES]])
    mask = (ids != IMAGE).long()
    logits = ours(input_ids=ids, attention_mask=mask, pixel_values=pixels(1)).logits
    torch.testing.assert_close(logits[:, :5], stock_twin(ours)(input_ids=ids[:, :5]).logits)


@torch.no_grad()
@pytest.mark.parametrize("of_masked", ["ones", "zeros", "counted"])
def test_positions_around_a_masked_picture_behind_one_word(ours, of_masked):
    ids = torch.tensor([[7, *[IMAGE] * NUM_PATCHES, 8, 9, 10]])
    mask = (ids != IMAGE).long()
    positions = torch.arange(ids.shape[1])[None] if of_masked == "counted" else mask.cumsum(1) - 1
    if of_masked != "counted":
        positions = positions.masked_fill(mask == 0, int(of_masked == "ones"))
    logits = ours(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels(1)).logits
    words = mask[0].bool()
    short = torch.tensor([[0, *range(1 + BUDGET, 4 + BUDGET)]]) if of_masked == "counted" else None
    expected = stock_twin(ours)(input_ids=ids[:, words], position_ids=short).logits
    torch.testing.assert_close(logits[:, words], expected)


@torch.no_grad()
def test_rows_that_lose_unequally_behind_a_cache_without_a_mask(ours):
    """Padding is added behind what the cache holds, which all rows see."""
    start = torch.tensor([prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES], [8, 9])])
    more = torch.tensor([[5, *[IMAGE] * NUM_PATCHES, 11, 12], [6] * (NUM_PATCHES + 1) + [13, 14]])
    pictures, cache = pixels(3), DynamicCache()
    ours(input_ids=start, pixel_values=pictures[:2], **{CACHE_NAME: cache})
    logits = ours(input_ids=more, pixel_values=pictures[2:], **{CACHE_NAME: cache}).logits
    for row, images in enumerate(([0, 2], [1])):
        alone = torch.cat([start[row], more[row]])[None]
        expected = ours(input_ids=alone, pixel_values=pictures[images]).logits[0, -more.shape[1] :]
        torch.testing.assert_close(logits[row], expected)
