"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions, ragged images and videos, and the contract of `generate`."""

import copy
import json
from pathlib import Path

import pytest
import torch
from clean_process import run_clean
from tiny import of_kept
from tiny_qwen import (
    FAMILIES,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    batch,
    build,
    our_class,
    pixels,
    positions_seen,
    prompt,
    stock_twin,
    tokens_of,
)
from transformers import DynamicCache, StaticCache

from modeling_prunesid.select_tokens import select_tokens
from modeling_prunesid.upstream import CACHE_NAME, cache_of


PRESETS = Path(__file__).resolve().parent.parent / "configuration"
BIG, WIDE, TALL, SMALL = (1, 8, 12), (1, 6, 16), (1, 12, 6), (1, 4, 4)
CLIP, LONG_CLIP = (2, 8, 8), (3, 6, 8)
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}

PROMPTS = {
    "one image": [[5, ("image", BIG), 6, 7]],
    "image first": [[("image", BIG), 6, 7]],
    "two images and text between": [[5, ("image", BIG), 6, 7, ("image", TALL), 8]],
    "small image left whole": [[5, ("image", SMALL), 6, ("image", WIDE), 8]],
    "one video": [[5, ("video", CLIP), 6, 7]],
    "image and video": [[5, ("image", BIG), 6, ("video", LONG_CLIP), 7, ("image", WIDE), 8]],
    "different grids": [
        [5, ("image", BIG), 6],
        [5, 6, ("image", WIDE), 7],
        [("image", TALL), 8],
        [7, ("image", SMALL)],
    ],
    "video, images and text-only rows": [
        [5, ("video", CLIP), 6, ("image", BIG), 7],
        [5, 6, 7],
        [("image", WIDE), 6, ("image", TALL), 6, ("video", LONG_CLIP), 9],
    ],
}


# What the contract has not: images beside videos, and views that are left whole.
MIXED = ["image and video", "video, images and text-only rows"]


@pytest.fixture(params=[pytest.param(n, marks=() if n == "Qwen3VL" else pytest.mark.contract) for n in FAMILIES])
def family(request):
    return request.param


@pytest.fixture
def ours(family):
    return build(family)


@pytest.fixture
def stock(ours, family):
    return stock_twin(ours, family)


def inputs_of(family, name, side="left", seed=0):
    return batch(family, *[prompt(family, *parts) for parts in PROMPTS[name]], seed=seed, side=side)


def full_positions(stock, inputs):
    """The stock model's coordinates of a full prompt, `(3, batch, length)`."""
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    if "second_per_grid_ts" in inputs:
        grids["second_per_grid_ts"] = inputs["second_per_grid_ts"]
    if all(grid is None for grid in grids.values()):
        return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    return stock.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        attention_mask=inputs["attention_mask"],
        **grids,
    )[0]


def keep_mask_of(model, inputs):
    """The columns that remain, from the indices of the encoders alone, without the padding."""
    keep_mask = inputs["attention_mask"].bool()
    for kind, suffix, token in (("image", "", IMAGE), ("video", "_videos", VIDEO)):
        if f"{kind}_grid_thw" not in inputs:
            continue
        encode = getattr(model, f"get_{kind}_features")
        output = encode(inputs[f"pixel_values{suffix}"], inputs[f"{kind}_grid_thw"], return_dict=True)
        totals = [tokens_of(grid) for grid in inputs[f"{kind}_grid_thw"].tolist()]
        kept = output.get("keep_indices") or [torch.arange(total) for total in totals]
        flags = []
        for total, indices in zip(totals, kept):
            flags.append(torch.zeros(total, dtype=torch.bool).scatter(0, indices, True))
        keep_mask[inputs["input_ids"] == token] = torch.cat(flags)
    return keep_mask


def oracle_inputs(ours, stock, inputs, side="left"):
    """What the stock `generate` needs to do the same: the short prompt, its features, positions of the full one."""
    keep_mask = keep_mask_of(ours, inputs)
    mask = of_kept(inputs["attention_mask"], keep_mask, side)
    text = (mask.cumsum(1) - 1).clamp(min=0)
    positions = [of_kept(axis, keep_mask, side) for axis in full_positions(stock, inputs)]
    features = {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if f"{kind}_grid_thw" in inputs:
            grid, pixel_values = inputs[f"{kind}_grid_thw"], inputs[f"pixel_values{suffix}"]
            output = getattr(stock, f"get_{kind}_features")(pixel_values, grid, return_dict=True)
            kept = keep_mask[inputs["input_ids"] == (IMAGE if kind == "image" else VIDEO)]
            kept = kept.split([tokens_of(size) for size in grid.tolist()])
            output.pooler_output = [view[rows] for view, rows in zip(output.pooler_output, kept)]
            if "deepstack_features" in output:
                layers = output.deepstack_features
                output.deepstack_features = [[view[rows] for view, rows in zip(layer, kept)] for layer in layers]
            features[kind] = output
    return {
        "input_ids": of_kept(inputs["input_ids"], keep_mask, side),
        "attention_mask": mask,
        "mm_token_type_ids": of_kept(inputs["mm_token_type_ids"], keep_mask, side),
        "position_ids": torch.stack([text, *positions]),
        "mm_encoder_outputs": features,
    }


def new_tokens(output, inputs):
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


# Positions


@pytest.mark.parametrize("name, side", [*((name, "left") for name in PROMPTS), *((name, "right") for name in MIXED)])
def test_kept_tokens_have_the_coordinates_of_the_stock_model(ours, stock, family, name, side):
    inputs = inputs_of(family, name, side)
    expected = full_positions(stock, inputs)
    with torch.no_grad(), positions_seen(ours) as seen:
        output = ours(**inputs)
    keep_mask = keep_mask_of(ours, inputs)
    assert keep_mask.sum() < inputs["attention_mask"].sum()
    assert torch.equal(output.keep_mask, keep_mask)
    mask = of_kept(inputs["attention_mask"], keep_mask, side).bool()
    for axis, positions in zip(expected, seen[0]):
        assert torch.equal(positions[mask], of_kept(axis, keep_mask, side)[mask])


@pytest.mark.parametrize("name", [*MIXED, "small image left whole"])
def test_stock_model_given_these_positions_computes_the_same_logits(ours, stock, family, name):
    inputs = inputs_of(family, name)
    with torch.no_grad():
        output = ours(**inputs)
        expected = stock(**oracle_inputs(ours, stock, inputs))
    is_token = of_kept(inputs["attention_mask"], output.keep_mask).bool()
    torch.testing.assert_close(output.logits[output.keep_mask], expected.logits[is_token])


@pytest.mark.parametrize("name", ["image and video", "different grids", "video, images and text-only rows"])
def test_fifty_decoded_positions_equal_those_of_the_uncompressed_run(ours, stock, family, name):
    inputs = inputs_of(family, name)
    settings = {"do_sample": False, "max_new_tokens": 50, "min_new_tokens": 50}
    with positions_seen(ours) as seen:
        ours.generate(**inputs, **settings)
    with positions_seen(stock) as expected:
        stock.generate(**inputs, **settings)
    assert len(seen) == len(expected) == 50
    assert seen[0].shape[2] < expected[0].shape[2]
    for step, stock_step in zip(seen[1:], expected[1:]):
        assert torch.equal(step, stock_step)


@pytest.mark.parametrize("is_short", [False, True])
@pytest.mark.parametrize("with_mask", [True, False])
def test_fifty_positions_of_a_manual_decode_equal_those_of_the_uncompressed_run(
    ours, stock, family, with_mask, is_short
):
    # Without a mask `forward` takes every column for a token, so that there may be no padding.
    inputs = inputs_of(family, "video, images and text-only rows" if with_mask else "image and video")
    given = dict(inputs)
    if is_short:
        keep_mask = keep_mask_of(ours, inputs)
        for column in ("input_ids", "attention_mask", "mm_token_type_ids"):
            given[column] = of_kept(inputs[column], keep_mask)
    if not with_mask:
        del given["attention_mask"]
    mask, cache = given.get("attention_mask"), DynamicCache()
    with torch.no_grad(), positions_seen(ours) as seen:
        ours(**given, **{CACHE_NAME: cache})
        for _ in range(49):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1) if with_mask else None
            token = torch.full((len(inputs["input_ids"]), 1), 7)
            ours(input_ids=token, attention_mask=mask, **{CACHE_NAME: cache})
    with torch.no_grad():
        stock(**inputs)
    batch_size, length = inputs["input_ids"].shape
    for step, positions in enumerate(seen[1:], start=1):
        # Upstream's own rule, for the whole of the uncompressed prompt and what was decoded.
        expected = stock.model.compute_3d_position_ids(
            input_ids=None,
            inputs_embeds=torch.empty(batch_size, length + step, 0),
            attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1),
            image_grid_thw=None,
            video_grid_thw=None,
            **{CACHE_NAME: None},
        )
        assert torch.equal(positions, expected[:, :, -1:])


def test_positions_of_beams_equal_those_of_the_uncompressed_run(ours, stock, family):
    inputs = inputs_of(family, "different grids")
    with positions_seen(ours) as seen:
        ours.generate(**inputs, **GREEDY, num_beams=3)
    with positions_seen(stock) as expected:
        stock.generate(**inputs, **GREEDY, num_beams=3)
    for step, stock_step in zip(seen[1:], expected[1:], strict=True):
        assert torch.equal(step, stock_step)


def test_a_short_prompt_is_given_the_same_positions_and_answers(ours, family):
    for name in MIXED:
        inputs = inputs_of(family, name)
        keep_mask = keep_mask_of(ours, inputs)
        short = dict(inputs)
        for column in ("input_ids", "attention_mask", "mm_token_type_ids"):
            short[column] = of_kept(inputs[column], keep_mask)
        with torch.no_grad(), positions_seen(ours) as seen:
            from_full, from_short = ours(**inputs), ours(**short)
        assert torch.equal(seen[0], seen[1])
        is_token = short["attention_mask"].bool()
        assert torch.equal(from_full.logits[keep_mask], from_short.logits[is_token])
        with positions_seen(ours) as seen:
            answer, short_answer = ours.generate(**inputs, **GREEDY), ours.generate(**short, **GREEDY)
        assert torch.equal(new_tokens(answer, inputs), new_tokens(short_answer, short))
        for step, short_step in zip(seen[:8], seen[8:], strict=True):
            assert torch.equal(step, short_step)


def test_contiguous_positions_number_the_short_prompt_through(family):
    model = build(family, mrope_positions="contiguous")
    inputs = inputs_of(family, "video, images and text-only rows")
    mask = of_kept(inputs["attention_mask"], keep_mask_of(model, inputs))
    with positions_seen(model) as seen:
        answer = model.generate(**inputs, **GREEDY)
    expected = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(seen[0], expected.expand(3, -1, -1))
    for step, positions in enumerate(seen[1:], start=1):
        assert torch.equal(positions, (expected[:, -1:] + step).expand(3, -1, -1))
    with torch.no_grad(), positions_seen(model) as seen:
        cache = cache_of(model(**inputs))
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(mask[:, :1])], dim=1)
        model(input_ids=answer[:, -1:], attention_mask=mask, **{CACHE_NAME: cache})
    assert torch.equal(seen[1], (expected[:, -1:] + 1).expand(3, -1, -1))


def test_positions_that_the_caller_passes_are_kept(ours, stock, family):
    inputs = inputs_of(family, "image and video")
    positions = full_positions(stock, inputs) + 3
    keep_mask = keep_mask_of(ours, inputs)
    for given in (positions, torch.cat([torch.arange(positions.shape[2]).expand(1, 1, -1), positions])):
        with torch.no_grad(), positions_seen(ours) as seen:
            ours(**inputs, position_ids=given)
        assert torch.equal(seen[0], positions[:, keep_mask][:, None])


def test_without_token_types_generate_numbers_the_prompt_like_upstream(ours, stock, family):
    inputs = inputs_of(family, "different grids")
    del inputs["mm_token_type_ids"]
    with positions_seen(ours) as seen:
        ours.generate(**inputs, **GREEDY)
    with positions_seen(stock) as expected:
        stock.generate(**inputs, **GREEDY)
    keep_mask = keep_mask_of(ours, inputs)
    assert torch.equal(seen[0][0], of_kept(expected[0][0], keep_mask))
    for step, stock_step in zip(seen[1:], expected[1:], strict=True):
        assert torch.equal(step, stock_step)


# Which tokens are kept


def test_each_image_keeps_its_share_in_any_batch(ours, family):
    grids = [BIG, WIDE, SMALL, TALL]
    together = torch.cat([pixels([grid], seed=1) for grid in grids])
    kept = ours.get_image_features(together, torch.tensor(grids), return_dict=True)
    assert [len(indices) for indices in kept.keep_indices] == [6, 6, 4, 5]
    assert kept.num_placeholders == [24, 24, 4, 18]
    for index, grid in enumerate(grids):
        alone = ours.get_image_features(pixels([grid], seed=1), torch.tensor([grid]), return_dict=True)
        if grid == SMALL:
            assert "keep_indices" not in alone
        else:
            assert torch.equal(alone.keep_indices[0], kept.keep_indices[index])
        torch.testing.assert_close(alone.pooler_output[0], kept.pooler_output[index])


def test_lambda_and_groups_are_shares_of_the_tokens(ours, stock, family):
    output = ours.get_image_features(pixels([BIG], 0), torch.tensor([BIG]), return_dict=True)
    features = stock.get_image_features(pixels([BIG], 0), torch.tensor([BIG]), return_dict=True).pooler_output[0]
    expected = select_tokens(features[None], 6, num_groups=6 // 4, nms_lambda=18 * 6 / 24).indices[0]
    assert torch.equal(output.keep_indices[0], expected)
    assert torch.equal(output.pooler_output[0], features[expected])


def test_each_temporal_slice_of_a_video_is_chosen_for_itself(ours, stock, family):
    pixel_values, grid = pixels([LONG_CLIP], 0), torch.tensor([LONG_CLIP])
    output = ours.get_video_features(pixel_values, grid, return_dict=True)
    features = stock.get_video_features(pixel_values, grid, return_dict=True).pooler_output[0]
    slices = [select_tokens(view[None], 4, nms_lambda=18 * 4 / 12).indices[0] for view in features.view(3, 12, -1)]
    expected = torch.cat([indices + 12 * start for start, indices in enumerate(slices)])
    assert torch.equal(output.keep_indices[0], expected)
    assert output.num_placeholders == [36]


def test_deepstack_features_are_those_of_the_same_tokens():
    ours = build("Qwen3VL")
    stock = stock_twin(ours, "Qwen3VL")
    arguments = torch.cat([pixels([BIG], 0), pixels([TALL], 1)]), torch.tensor([BIG, TALL])
    output, full = ours.get_image_features(*arguments), stock.get_image_features(*arguments)
    assert len(output.deepstack_features) == 2
    for layer, full_layer in zip(output.deepstack_features, full.deepstack_features):
        for view, full_view, kept in zip(layer, full_layer, output.keep_indices):
            assert torch.equal(view, full_view[kept])


def test_timestamps_and_frame_markers_of_a_video_stay():
    ours = build("Qwen3VL")
    inputs = inputs_of("Qwen3VL", "image and video")
    keep_mask = ours(**inputs).keep_mask
    short = inputs["input_ids"][keep_mask].tolist()
    expected = [5, VISION_START, *[IMAGE] * 6, VISION_END, 6]
    for frame in range(3):
        expected += [10 + frame, VISION_START, *[VIDEO] * 4, VISION_END]
    assert short == [*expected, 7, VISION_START, *[IMAGE] * 6, VISION_END, 8]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"min_budget": 16}, [16, 4]),
        ({"min_budget": None}, [6, 1]),
        ({"budget": 5, "min_budget": 16}, [5, 4]),
        ({"budget": 0.6, "min_budget": 8}, [14, 4]),
        ({"budget": 100}, [24, 4]),
    ],
    ids=str,
)
def test_a_floor_holds_for_shares_and_a_count_is_obeyed(family, settings, expected):
    model = build(family, **settings)
    pixel_values = torch.cat([pixels([BIG], 0), pixels([SMALL], 0)])
    output = model.get_image_features(pixel_values, torch.tensor([BIG, SMALL]), return_dict=True)
    assert [len(view) for view in output.pooler_output] == expected


def test_by_default_a_third_is_kept_and_at_least_sixteen(family):
    settings = our_class(family, "Config")().prunesid_config
    assert settings.budget == 1 / 3
    assert settings.min_budget == 16


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("qwen_vl_*.json")), ids=lambda path: path.stem)
def test_presets_keep_the_paper_s_shares(preset, family):
    model = build(family, **{"min_budget": None, **json.loads(preset.read_text())})
    grid = (1, 24, 24)
    output = model.get_image_features(pixels([grid], 0), torch.tensor([grid]), return_dict=True)
    percent = int(preset.stem.split("_")[2])
    assert len(output.keep_indices[0]) == {33: 48, 22: 32, 11: 16}[percent]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "method='release' needs cls_attention of a vision tower with a CLS token"),
        ({"score": "component"}, "has keep_cls=True"),
    ],
)
def test_settings_that_need_a_cls_token_are_refused(family, settings, message):
    with pytest.raises(ValueError, match=f"{message}.* no CLS token"):
        our_class(family, "Config")(prunesid_config={"method": "release", "method_settings": settings})
    model = build(family)
    model.config.prunesid_config.method = "release"
    model.config.prunesid_config.method_settings = settings
    with pytest.raises(ValueError, match=f"{message}.* no CLS token"):
        model(**inputs_of(family, "one image"))


def test_a_budget_of_one_call_may_be_a_count_a_share_or_one_for_each_image(ours, family):
    pixel_values, grids = torch.cat([pixels([BIG], 0), pixels([WIDE], 0)]), torch.tensor([BIG, WIDE])

    def counts(num_visual_tokens):
        output = ours.get_image_features(pixel_values, grids, num_visual_tokens=num_visual_tokens, return_dict=True)
        return [len(view) for view in output.pooler_output]

    assert counts(7) == [7, 7]
    assert counts(0.5) == [12, 12]
    assert counts([3, 9]) == counts(torch.tensor([3, 9])) == [3, 9]
    assert counts(1.0) == [24, 24]
    with pytest.raises(ValueError, match=r"num_visual_tokens must have one count for each of the 2 .*got 3"):
        counts([3, 9, 5])
    with pytest.raises(ValueError, match="num_visual_tokens must be a positive integer.*got 0"):
        counts(0)


def test_a_total_of_a_clip_is_shared_by_information(family):
    model = build(family, budget=0.25, min_budget=None, budget_scope="image", dynamic=True)
    pixel_values = pixels([LONG_CLIP], 0)
    pixel_values[: len(pixel_values) // 3] = pixel_values[0]  # the first slice shows the same everywhere
    output = model.get_video_features(pixel_values, torch.tensor([LONG_CLIP]), return_dict=True)
    shares = torch.bincount(output.keep_indices[0] // 12, minlength=3).tolist()
    assert sum(shares) == 9
    assert shares[0] < min(shares[1:])
    with pytest.raises(ValueError, match="gives 2 tokens to an input of 3 views"):
        model.get_video_features(pixel_values, torch.tensor([LONG_CLIP]), num_visual_tokens=[2])


def test_dynamic_budgets_follow_the_information_of_each_image(family):
    model = build(family, dynamic=True, reference_information=0.9, min_budget=2)
    pixel_values = torch.cat([pixels([BIG], 0), pixels([BIG], 1)[:1].expand(96, -1)])
    output = model.get_image_features(pixel_values, torch.tensor([BIG, BIG]), return_dict=True)
    counts = [len(view) for view in output.pooler_output]
    assert counts[1] < counts[0]
    inputs = batch(family, prompt(family, 5, ("image", BIG), 6, ("image", BIG), 7))
    inputs["pixel_values"] = pixel_values
    assert int((model(**inputs).keep_mask & (inputs["input_ids"] == IMAGE)).sum()) == sum(counts)


# generate


@pytest.mark.parametrize("name", ["different grids", "video, images and text-only rows"])
def test_a_batch_answers_as_its_rows_do_alone(ours, family, name):
    together = inputs_of(family, name)
    answers = new_tokens(ours.generate(**together, **GREEDY), together)
    for answer, parts in zip(answers, PROMPTS[name]):
        alone = batch(family, prompt(family, *parts))
        assert torch.equal(new_tokens(ours.generate(**alone, **GREEDY), alone)[0], answer)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["different grids", "one video"])
def test_generate_equals_the_stock_one_on_short_prompts(ours, stock, family, name, mode):
    inputs = inputs_of(family, name)
    mode = {"max_new_tokens": 8, "min_new_tokens": 8, **mode}
    torch.manual_seed(0)
    output = ours.generate(**inputs, **mode)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    times = mode.get("num_return_sequences", 1)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(sequences[:, :length], inputs["input_ids"].repeat_interleave(times, 0))
    torch.manual_seed(0)
    if mode.get("use_cache") is False:
        mode = {**mode, "use_cache": True}  # upstream drops features after the prefill only with a cache
    short = oracle_inputs(ours, stock, inputs)
    assert torch.equal(new_tokens(output, inputs), new_tokens(stock.generate(**short, **mode), short))


def test_prompt_lookup_and_assisted_decoding_equal_greedy(ours, family):
    inputs = inputs_of(family, "image and video")
    greedy = ours.generate(**inputs, **GREEDY)
    assert torch.equal(ours.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2), greedy)


def test_chunked_prefill_does_what_the_stock_one_does(ours, stock, family):
    inputs = inputs_of(family, "image and video")

    def outcome(model, inputs):
        try:
            return new_tokens(model.generate(**inputs, **GREEDY, prefill_chunk_size=5), inputs).tolist()
        except RuntimeError as error:  # Transformers 5.18 cuts three-dimensional positions along the batch
            return str(error)

    assert outcome(ours, inputs) == outcome(stock, oracle_inputs(ours, stock, inputs))


def extended(inputs, answer, parts, family, seed=0):
    """The conversation after `answer`, with another turn of the user: all of it, and the inputs of the new turn."""
    turn = batch(family, prompt(family, *parts), seed=seed)
    whole = {**inputs, "input_ids": torch.cat([answer, turn["input_ids"]], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    ids = whole["input_ids"]
    whole["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        if name in turn:
            whole[name] = torch.cat([whole[name], turn[name]]) if name in whole else turn[name]
    return whole, turn


VISUAL = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
TURNS = {
    "text": [20, 21, 22],
    "new image": [20, ("image", WIDE), 21],
    "new small image": [20, ("image", SMALL), 21],
    "new image and video": [20, ("image", WIDE), 21, ("video", CLIP), 22],
}


@pytest.mark.parametrize("given", ["all views", "new views", "new ids"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_cached_chat_answers_as_one_without_a_cache(ours, family, turn, given):
    first = inputs_of(family, "two images and text between")
    cache = DynamicCache()
    answer = ours.generate(**first, **GREEDY, **{CACHE_NAME: cache})
    whole, new = extended(first, answer, TURNS[turn], family, seed=3)
    with positions_seen(ours) as seen:
        expected = new_tokens(ours.generate(**whole, **GREEDY), whole)
    # What ran in between must not matter.
    ours.generate(**inputs_of(family, "one video"), **GREEDY)
    if given == "all views":
        cached = whole
    else:
        cached = {name: value for name, value in whole.items() if name not in VISUAL}
        cached.update({name: new[name] for name in VISUAL if name in new})
    if given == "new ids":
        # The last token of the answer is not in the cache yet.
        length = new["input_ids"].shape[1] + 1
        cached["input_ids"] = cached["input_ids"][:, -length:]
        cached["mm_token_type_ids"] = cached["mm_token_type_ids"][:, -length:]
    with positions_seen(ours) as cached_seen:
        output = ours.generate(**cached, **GREEDY, **{CACHE_NAME: cache})
    assert torch.equal(new_tokens(output, cached), expected)
    assert torch.equal(cached_seen[0], seen[0][:, :, -cached_seen[0].shape[2] :])
    for step, uncached in zip(cached_seen[1:], seen[1:], strict=True):
        assert torch.equal(step, uncached)


def test_a_cached_chat_goes_on_without_the_token_types_of_its_answer(ours, family):
    inputs, cache = inputs_of(family, "image and video"), DynamicCache()
    answer = ours.generate(**inputs, **GREEDY, **{CACHE_NAME: cache})
    expected = ours.generate(**inputs, do_sample=False, max_new_tokens=10, min_new_tokens=10)
    again = {**inputs, "input_ids": answer, "attention_mask": torch.ones_like(answer)}
    assert torch.equal(ours.generate(**again, do_sample=False, max_new_tokens=2, **{CACHE_NAME: cache}), expected)


def test_three_cached_turns_with_a_view_in_each(ours, family):
    inputs, cache = inputs_of(family, "one image"), DynamicCache()
    for parts in (TURNS["new image"], TURNS["new image and video"], TURNS["text"]):
        answer = ours.generate(**inputs, **GREEDY, **{CACHE_NAME: cache})
        assert torch.equal(answer, ours.generate(**inputs, **GREEDY))
        inputs, _ = extended(inputs, answer, parts, family, seed=len(parts))


def test_two_chats_with_caches_of_their_own_do_not_disturb_each_other(ours, family):
    chats = {name: inputs_of(family, name) for name in ("one image", "one video", "small image left whole")}
    caches = {name: DynamicCache() for name in chats}
    answers = {name: ours.generate(**chats[name], **GREEDY, **{CACHE_NAME: caches[name]}) for name in chats}
    for name in chats:
        whole, _ = extended(chats[name], answers[name], TURNS["text"], family)
        cached = ours.generate(**whole, **GREEDY, **{CACHE_NAME: caches[name]})
        assert torch.equal(cached, ours.generate(**whole, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("with_mask", [True, False])
def test_an_image_behind_text_in_a_cache_after_another_chat(ours, family, with_mask):
    image = batch(family, prompt(family, 5, ("image", (1, 8, 8)), 6))
    text = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])
    whole = {name: torch.cat([torch.zeros_like(text), image[name]], 1) for name in ("input_ids", "mm_token_type_ids")}
    whole["input_ids"][:, : text.shape[1]] = text
    mask = {"attention_mask": torch.ones_like(whole["input_ids"])} if with_mask else {}
    image = {name: value for name, value in image.items() if name != "attention_mask"}
    expected = ours(**{**image, **whole, **mask}).logits[:, -1]
    ours(**batch(family, prompt(family, 5, ("image", (1, 4, 12)), 6)))

    cache = DynamicCache(config=ours.config.get_text_config())
    ours(input_ids=text, **{CACHE_NAME: cache}, **({"attention_mask": torch.ones_like(text)} if with_mask else {}))
    torch.testing.assert_close(ours(**image, **mask, **{CACHE_NAME: cache}).logits[:, -1], expected)


@torch.no_grad()
def test_text_is_numbered_from_the_start_whatever_came_before(ours, family):
    def answer(cache):
        ours(input_ids=torch.tensor([[1, 5, 6, 7]]), **{CACHE_NAME: cache})
        return ours(input_ids=torch.tensor([[8]]), **{CACHE_NAME: cache}).logits

    caches = [StaticCache(config=ours.config.get_text_config(), max_cache_len=64), DynamicCache()]
    expected = answer(DynamicCache())
    ours(**batch(family, prompt(family, 5, ("image", (1, 8, 8)), 6)), **{CACHE_NAME: caches[0]})
    caches[0].reset()
    for cache in caches:
        torch.testing.assert_close(answer(cache), expected)


def test_inputs_embeds_of_a_full_prompt_are_shortened(ours, family):
    inputs = inputs_of(family, "two images and text between")
    embeds = ours.get_input_embeddings()(inputs["input_ids"])
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "attention_mask")}
    with torch.no_grad(), positions_seen(ours) as seen:
        output = ours(inputs_embeds=embeds, **given)
    keep_mask = keep_mask_of(ours, inputs)
    assert torch.equal(output.keep_mask, keep_mask)
    assert torch.equal(seen[0][0, 0], torch.arange(keep_mask.shape[1])[keep_mask[0]])


# Off means off


OFF = [{"budget": None}, {"budget": 1.0}]


@pytest.mark.parametrize("settings", OFF, ids=str)
@pytest.mark.parametrize("name", ["different grids", "video, images and text-only rows"])
def test_off_is_the_stock_model_to_the_bit(family, settings, name):
    model = build(family, **settings)
    stock = stock_twin(model, family)
    inputs = inputs_of(family, name)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad(), positions_seen(model) as seen, positions_seen(stock) as expected:
        output, stock_output = model(**inputs, labels=labels), stock(**inputs, labels=labels)
        answer, stock_answer = model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY)
    assert torch.equal(output.logits, stock_output.logits)
    assert torch.equal(output.loss, stock_output.loss)
    assert "keep_mask" not in output
    assert torch.equal(answer, stock_answer)
    assert torch.equal(model.model.rope_deltas, stock.model.rope_deltas)
    for positions, stock_positions in zip(seen, expected, strict=True):
        assert torch.equal(positions, stock_positions)


def test_one_model_switches_on_and_off(ours, stock, family):
    inputs = inputs_of(family, "image and video")
    compressed, full = ours.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY)
    assert torch.equal(ours.generate(**inputs, **GREEDY, num_visual_tokens=1.0), full)
    ours.config.prunesid_config.budget = None
    assert torch.equal(ours.generate(**inputs, **GREEDY), full)
    ours.config.prunesid_config.budget = 0.25
    assert torch.equal(ours.generate(**inputs, **GREEDY), compressed)


# forward, training, errors


def test_loss_is_the_mean_over_the_kept_columns_and_gradients_reach_every_part(ours, stock, family):
    inputs = inputs_of(family, "image and video")
    labels = inputs["input_ids"].clone()
    output = ours(**inputs, labels=labels)
    short = oracle_inputs(ours, stock, inputs)
    expected = stock(**short, labels=short["input_ids"].masked_fill(short["input_ids"] >= IMAGE, -100))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    for part in (ours.model.visual.merger, ours.model.visual.patch_embed, ours.model.language_model.layers[0]):
        assert all(parameter.grad is not None for parameter in part.parameters())


def test_logits_to_keep_and_the_base_model(ours, family):
    inputs = inputs_of(family, "different grids")
    with torch.no_grad():
        logits = ours(**inputs).logits
        torch.testing.assert_close(ours(**inputs, logits_to_keep=2).logits, logits[:, -2:])
        states = ours.model(**inputs).last_hidden_state
    torch.testing.assert_close(ours.lm_head(states), logits)


def test_a_prompt_of_another_count_is_refused(ours, family):
    inputs = inputs_of(family, "one image")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) == 3, 9)
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 23, features: 6"):
        ours(**inputs)
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 23, features: 6"):
        ours.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("kind, grid", [("image", BIG), ("video", LONG_CLIP)])
def test_features_as_a_tuple(ours, family, kind, grid):
    encode, arguments = getattr(ours, f"get_{kind}_features"), (pixels([grid], 0), torch.tensor([grid]))
    assert isinstance(encode(*arguments, return_dict=False), tuple)
    assert len(encode(*arguments, return_dict=True).pooler_output) == 1
    ours.config.return_dict = False
    assert isinstance(encode(*arguments), tuple)


def test_a_copy_of_a_used_model_works(ours, family):
    inputs = inputs_of(family, "one image")
    answer = ours.generate(**inputs, **GREEDY)
    assert torch.equal(copy.deepcopy(ours).generate(**inputs, **GREEDY), answer)


# Loading and saving


def assert_nothing_is_missing(info):
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
def test_checkpoints_with_a_flat_configuration_load_whole(family, tmp_path):
    ours = build(family)
    stock_twin(ours, family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    del text["model_type"], config["vision_config"]["model_type"]
    (tmp_path / "config.json").write_text(json.dumps({**text, **config}))
    loaded, info = our_class(family).from_pretrained(
        tmp_path, prunesid_config={"budget": 0.25, "min_budget": 4}, output_loading_info=True
    )
    assert_nothing_is_missing(info)
    inputs = inputs_of(family, "image and video")
    assert torch.equal(loaded.generate(**inputs, **GREEDY), ours.generate(**inputs, **GREEDY))


CLIENT = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_prunesid":
            raise ImportError("this process has to do without the package")

sys.meta_path.insert(0, NoPackage())
seen = {}
for folder in sys.argv[1:]:
    inputs = torch.load(folder + "/inputs.pt")
    answers = []
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        answers.append(model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8).tolist())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_config(config, trust_remote_code=True)
    seen[type(model).__name__] = [answers, type(base).__name__, config.prunesid_config.budget]
print(json.dumps(seen))
"""


@pytest.mark.contract
def test_saved_folders_run_where_the_package_cannot_be_imported(tmp_path):
    expected = {}
    for family in FAMILIES:
        ours, inputs = build(family), inputs_of(family, "image and video")
        answer = ours.generate(**inputs, **GREEDY).tolist()
        expected[our_class(family).__name__] = [[answer] * 3, our_class(family, "Model").__name__, 0.25]
        ours.save_pretrained(tmp_path / family)
        torch.save(inputs, tmp_path / family / "inputs.pt")
    assert run_clean(CLIENT, tmp_path / "home", *(tmp_path / family for family in FAMILIES)) == expected
