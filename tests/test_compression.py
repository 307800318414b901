"""Shortened prompts against plain Python lists."""

import functools
import inspect
import random

import pytest
import torch

from modeling_prunesid.prompts import ShortPrompt
from modeling_prunesid.readings import read_placeholders
from modeling_prunesid.upstream import like_upstream


FILL = -7


def random_mask(rng, batch, length, share=0.6):
    return torch.tensor([[rng.random() < share for _ in range(length)] for _ in range(batch)]).view(batch, length)


def kept_columns(mask_row):
    return [column for column, kept in enumerate(mask_row.tolist()) if kept]


def padded(rows, side, fill):
    length = max(map(len, rows))
    return [
        [fill] * (length - len(row)) + row if side == "left" else row + [fill] * (length - len(row)) for row in rows
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(20))
def test_take_gathers_the_kept_columns_and_pads_the_short_rows(side, seed):
    rng = random.Random(seed)
    mask = random_mask(rng, batch=rng.randint(1, 4), length=rng.randint(1, 12), share=rng.random())
    columns = torch.arange(mask.numel()).view(mask.shape)
    prompt = ShortPrompt.from_keep_mask(mask, side)
    expected = padded([[int(columns[r, c]) for c in kept_columns(row)] for r, row in enumerate(mask)], side, FILL)
    assert prompt.take(columns, FILL).tolist() == expected
    assert (prompt.full_length, prompt.length) == (mask.shape[1], len(expected[0]))
    assert prompt.keep_mask is mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_take_carries_further_dimensions_along(side):
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    columns = torch.randn(2, 4, 3, 2)
    taken = ShortPrompt.from_keep_mask(mask, side).take(columns, 0.0)
    assert taken.shape == (2, 3, 3, 2)
    place = 2 if side == "left" else 0
    assert torch.equal(taken[0], columns[0, [0, 2, 3]])
    assert torch.equal(taken[1, place], columns[1, 2])
    assert taken[1].count_nonzero() == columns[1, 2].count_nonzero()


def test_gradients_pass_through_the_kept_columns_alone():
    mask = torch.tensor([[True, False, True]])
    columns = torch.randn(1, 3, 2, requires_grad=True)
    ShortPrompt.from_keep_mask(mask, "left").take(columns, 0.0).sum().backward()
    assert torch.equal(columns.grad, mask[..., None].expand(1, 3, 2).float())


@pytest.mark.parametrize("seed", range(20))
def test_positions_move_up_to_be_contiguous(seed):
    rng = random.Random(seed)
    mask = random_mask(rng, batch=3, length=9)
    mask[:, 0] = True
    start = rng.randint(0, 5)
    positions = ShortPrompt.from_keep_mask(mask, "right").take_positions(torch.arange(start, start + 9).expand(3, -1))
    for row, kept in zip(positions.tolist(), mask):
        count = int(kept.sum())
        assert row[:count] == list(range(start, start + count))


def test_positions_of_packed_sequences_move_within_each_sequence():
    mask = torch.tensor([[True, False, True, True, False, False, True, True]])
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    # The first sequence keeps three columns, the second two.
    assert ShortPrompt.from_keep_mask(mask, "left").take_positions(packed).tolist() == [[0, 1, 2, 0, 1]]


def test_one_row_of_positions_serves_the_whole_batch():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    positions = ShortPrompt.from_keep_mask(mask, "left").take_positions(torch.arange(3)[None])
    assert positions.tolist() == [[0, 1], [0, 1]]


def test_a_prompt_that_goes_on_is_both_parts_side_by_side():
    first = torch.tensor([[True, False, True]])
    second = torch.tensor([[False, True]])
    both = ShortPrompt.from_keep_mask(first, "left").then(ShortPrompt.from_keep_mask(second, "left"))
    assert both.take(torch.tensor([[10, 11, 12, 13, 14]]), FILL).tolist() == [[10, 12, 14]]
    assert both.keep_mask.tolist() == [[True, False, True, False, True]]


def test_rows_repeat_as_beams_do():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    repeated = ShortPrompt.from_keep_mask(mask, "left").take_rows(torch.tensor([0, 0, 1, 1]))
    columns = torch.arange(6).view(2, 3).repeat_interleave(2, 0)
    assert repeated.take(columns, FILL).tolist() == [[FILL, 0, 2]] * 2 + [[3, 4, 5]] * 2


def naive_mark(placeholders, num_placeholders, keep_indices):
    """Walk along the rows and count the placeholders of one view after the other."""
    keep = [[True] * len(row) for row in placeholders]
    cells = [(r, c) for r, row in enumerate(placeholders) for c, flag in enumerate(row) if flag]
    for total, kept in zip(num_placeholders, keep_indices):
        view, cells = cells[:total], cells[total:]
        wanted = {index for index in kept if index >= 0}
        homeless = sum(index < 0 for index in kept)
        wanted |= set([index for index in range(total) if index not in wanted][:homeless])
        for index, (r, c) in enumerate(view):
            keep[r][c] = index in wanted
    return keep


def mark_kept_placeholders(placeholders, num_placeholders, keep_indices, modality="image"):
    reading = read_placeholders(placeholders, num_placeholders, list(map(len, keep_indices)), modality)
    shortens = reading is not None and reading.shortens
    return reading.mark_kept(keep_indices, placeholders.device) if shortens else None


@pytest.mark.parametrize("seed", range(50))
def test_placeholders_of_dropped_tokens_are_marked(seed):
    rng = random.Random(seed)
    rows, num_placeholders, keep_indices = [], [], []
    for _ in range(rng.randint(1, 4)):
        row = [False] * rng.randint(0, 3)
        for _ in range(rng.randint(0, 3)):
            total = rng.randint(2, 9)
            kept = sorted(rng.sample(range(total), rng.randint(1, total - 1)))
            if rng.random() < 0.3:
                kept[0] = -1
            num_placeholders.append(total)
            keep_indices.append(kept)
            row += [True] * total + [False] * rng.randint(0, 2)
        rows.append(row)
    if not num_placeholders:
        num_placeholders, keep_indices = [3], [[1]]
        rows[0] += [True] * 3
    rows = padded(rows, "left", False)
    marked = mark_kept_placeholders(torch.tensor(rows), num_placeholders, [torch.tensor(k) for k in keep_indices])
    assert marked.tolist() == naive_mark(rows, num_placeholders, keep_indices)


def test_a_short_prompt_needs_no_marks():
    placeholders = torch.tensor([[False, True, True, False, True]])
    kept = [torch.tensor([0, 3]), torch.tensor([2])]
    assert mark_kept_placeholders(placeholders, [4, 4], kept) is None


@pytest.mark.parametrize("found", [0, 1, 2, 4, 5, 7, 9])
def test_another_count_of_placeholders_is_refused(found):
    placeholders = torch.tensor([[True] * found + [False]])
    kept = [torch.tensor([0, 3]), torch.tensor([2])]
    message = f"^Image features and image tokens do not match, tokens: {found}, features: 3.*8 for these 2 images"
    with pytest.raises(ValueError, match=message):
        mark_kept_placeholders(placeholders, [4, 4], kept)


def test_an_image_split_over_two_rows_is_refused():
    placeholders = torch.tensor([[True, True, True], [True, False, False]])
    with pytest.raises(ValueError, match="do not match, tokens: 3 in row 0"):
        mark_kept_placeholders(placeholders, [4], [torch.tensor([1])])


def test_a_short_prompt_with_an_image_split_over_two_rows_is_refused():
    placeholders = torch.tensor([[True, True, True], [True, False, False]])
    with pytest.raises(ValueError, match="do not match, tokens: 3 in row 0"):
        mark_kept_placeholders(placeholders, [4, 4], [torch.tensor([1, 2]), torch.tensor([0, 3])])


def test_the_error_names_the_modality():
    with pytest.raises(ValueError, match=r"^Video features and video tokens do not match"):
        mark_kept_placeholders(torch.tensor([[True]]), [4], [torch.tensor([1, 2])], "video")


class Upstream:
    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        return "upstream"


class Ours(Upstream):
    @like_upstream(Upstream.forward)
    def forward(self, *, labels=None, num_visual_tokens=None, **inputs):
        """Ours."""
        return {"labels": labels, "num_visual_tokens": num_visual_tokens, **inputs}


@pytest.mark.parametrize(
    "args, kwargs, expected",
    [
        ((), {}, {}),
        ((1,), {}, {"input_ids": 1}),
        ((1, 2, 3), {}, {"input_ids": 1, "labels": 2, "logits_to_keep": 3}),
        (
            (1,),
            {"logits_to_keep": 3, "num_visual_tokens": 8},
            {"input_ids": 1, "logits_to_keep": 3} | {"num_visual_tokens": 8},
        ),
        ((), {"labels": 2, "new_upstream": 5}, {"labels": 2, "new_upstream": 5}),
    ],
    ids=["none", "by place", "all by place", "mixed", "by name"],
)
def test_like_upstream_hands_over_what_was_passed_by_name(args, kwargs, expected):
    assert Ours().forward(*args, **kwargs) == {"labels": None, "num_visual_tokens": None, **expected}


@pytest.mark.parametrize(
    "args, kwargs, match",
    [
        ((1, 2, 3, 4), {}, "takes 3 arguments by place, got 4"),
        ((1,), {"input_ids": 1}, "multiple values.*'input_ids'"),
    ],
    ids=["too many", "twice"],
)
def test_like_upstream_refuses(args, kwargs, match):
    with pytest.raises(TypeError, match=match):
        Ours().forward(*args, **kwargs)


def test_like_upstream_shows_upstreams_arguments_and_ours():
    expected = "(input_ids=None, labels=None, logits_to_keep=0, *, num_visual_tokens=None, **kwargs)"
    forward = Ours().forward
    # As Accelerate puts a hook in front of a module.
    hooked = functools.update_wrapper(functools.partial(lambda module: None, None), forward)
    assert str(inspect.signature(forward)) == str(inspect.signature(hooked)) == expected
    assert str(inspect.signature(Ours.forward)) == expected.replace("(", "(self, ", 1)
    assert Ours.forward.__doc__ == "Ours."
