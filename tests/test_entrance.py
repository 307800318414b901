"""What is known before the tower runs is right, in every family, and a prompt that does not fit never starts it."""

import copy
import inspect

import pytest
import tiny_qwen
import torch
from families import ROWS, every_row
from tiny import BUDGET, IMAGE, NUM_PATCHES, batch, build, pixels, prompt

from modeling_prunesid.plans import is_counted


@every_row()
@torch.no_grad()
def test_counts_and_placeholders_are_found_as_upstream_finds_them(name):
    row = ROWS[name]
    settings = {"budget": row.budget, **row.settings}
    model = row.head(row.head.config_class(**copy.deepcopy(row.config), prunesid_config=settings)).eval()
    if row.prepare is not None:
        row.prepare(model)
    model = getattr(model, "model", model)
    ends = torch.tensor(row.rows).cumsum(0).tolist()
    inputs = row.inputs([list(range(end - count, end)) for count, end in zip(row.rows, ends)])
    counts = model.expected_counts(row.modality, inputs)
    count = sum(row.rows)
    assert counts in (None, (list(row.tokens[:count]), list(row.kept[:count])))

    upstream = getattr(model, "get_placeholder_mask", None)
    names = [] if upstream is None else list(inspect.signature(upstream).parameters)
    features = next((name for name in names if name in ("features", f"{row.modality}_features")), None)
    if features is None or row.fixed_layout:
        return
    ids = torch.tensor([[1, 5, *row.write(row.tokens[0], 0, row.token), 7]])
    embeds = model.get_input_embeddings()(ids)
    arguments = {"input_ids": ids, "inputs_embeds": embeds, features: embeds[ids == row.token]}
    if "token_id" in names:
        arguments["token_id"] = row.token
    if features == "image_features":  # in some families a tensor of three dimensions
        arguments[features] = arguments[features][None]
    expected = upstream(**arguments)
    token = is_counted.set(True)
    try:
        got = model.get_placeholder_mask(**arguments)
    finally:
        is_counted.reset(token)
    for own, theirs in zip(*(mask if isinstance(mask, tuple) else (mask,) for mask in (got, expected))):
        assert own.dim() == theirs.dim() and torch.equal(own.expand_as(theirs), theirs)


def count_calls(tower):
    calls = []
    tower.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("found", [0, BUDGET - 1, BUDGET + 1, NUM_PATCHES - 1, NUM_PATCHES + 1])
def test_a_prompt_that_does_not_fit_never_starts_the_tower(found, call):
    ours = build()
    calls = count_calls(ours.model.vision_tower)
    inputs = {**batch([[1, *[IMAGE] * found, 7, 8]]), "pixel_values": pixels(1)}
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        ours(**inputs) if call == "forward" else ours.generate(**inputs, max_new_tokens=1)
    assert not calls
    ours(**batch([prompt([NUM_PATCHES], [7])]), pixel_values=pixels(1))
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_a_prompt_of_other_grids_never_starts_the_tower(family):
    ours = tiny_qwen.build(family)
    calls = count_calls(ours.model.visual)
    inputs = tiny_qwen.batch(family, tiny_qwen.prompt(family, 5, ("image", (1, 8, 8)), ("video", (2, 4, 8)), 7))
    ours(**inputs)
    assert calls
    for modality in ("image", "video"):
        calls.clear()
        grids = {**inputs, f"{modality}_grid_thw": inputs[f"{modality}_grid_thw"][:, [0, 2, 1]] + 4}
        with pytest.raises(ValueError, match=f"{modality.capitalize()} features and {modality} tokens do not match"):
            ours(**grids)
        assert not calls
