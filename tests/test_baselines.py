"""The methods that PruneSID is compared with: each by a property of its own, and all of them in a model."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_qwen
import torch
from tiny import IMAGE, IMAGE_SIZE, NUM_PATCHES, TEXT, VISION, batch, build, pixels, prompt, stock_twin
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid import (
    PruneSIDConfig,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaNextConfig,
    PruneSIDLlavaNextForConditionalGeneration,
    register_method,
)
from modeling_prunesid.context import Context, counts_on
from modeling_prunesid.dynamic import information_budgets, redundancy
from modeling_prunesid.methods import METHODS as method_registry
from modeling_prunesid.single_views import highest
from prunesid_cli.baselines import (
    METHODS,
    applied,
    cdpruner,
    dart,
    divprune,
    downsample,
    dpp,
    fastv,
    hiprune,
    hired,
    mustdrop,
    prumerge,
    random_choice,
    sparsevlm,
    tome,
    uniform,
    visionzip,
    vispruner,
)
from prunesid_cli.baselines.encoder import encoder_method
from prunesid_cli.baselines.llm import Row, llm_method, scaled_layer
from prunesid_cli.baselines.seam import registered
from prunesid_cli.towers import run_tower, run_tower_with_cls


RELEASE = Path(__file__).parents[1] / "configuration" / "llava_1.5_64_release.json"
BUDGET, HEADS, DIM, WIDTH = 8, 4, 6, 16
SELECTORS = {
    "random": (random_choice, {}),
    "uniform": (uniform, {}),
    "hired": (hired, {}),
    "divprune": (divprune, {}),
    "dpp": (dpp, {}),
    "vispruner": (vispruner, {}),
    "prumerge": (prumerge, {}),
    "prumerge+": (prumerge, {"strided": True}),
    "visionzip": (visionzip, {}),
}
PRUNING = ("random", "uniform", "hired", "divprune", "dpp", "vispruner")
ENCODER_SIDE = [name for name, method in METHODS.items() if method.place == "encoder" and not method.reads_question]
GRIDS = {
    "downsample-image": 9,
    "downsample-features": 9,
    "downsample-enlarged": 49,
}  # tokens at a budget of 8 of 7 x 7
LLM_SIDE = ("fastv", "dart", "sparsevlm-v1.5", "mustdrop")
DINOV2 = {"model_type": "dinov2"}


def make_view(tokens, seed=0, **changes):
    """A random view `(1, tokens, DIM)` and the context of its tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(1, tokens, *shape, generator=generator)

    values = {
        "features": random(DIM),
        "projected": random(WIDTH),
        "attention": random().softmax(1),
        "joined_attention": random().softmax(1) * 0.9,
        "keys": random(HEADS, WIDTH // HEADS),
    }
    return random(DIM), Context(**{**values, **changes})


def choose(module, view, budget, **method_settings):
    """The indices that a method keeps of one view, and the features in place of theirs."""
    features, context = view
    settings = PruneSIDConfig(method_settings=None)
    object.__setattr__(settings, "method_settings", method_settings)
    context = replace(context, counts=[budget])
    selection = module.select(features, counts_on(features.device, [budget]), settings, context)
    assert selection.counts.tolist() == [budget]
    return selection.indices[0], None if selection.merged is None else selection.merged[0]


def random_cases(count, seed=0):
    """Random (T, N) with 1 <= N < T, small ones and the extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    cases = [(2, 1), (3, 2), (50, 49), (64, 1)]
    while len(cases) < count:
        tokens = int(torch.randint(2, 130, (), generator=generator))
        cases.append((tokens, int(torch.randint(1, tokens, (), generator=generator))))
    return cases


@pytest.mark.parametrize("name", SELECTORS)
def test_exactly_n_ascending_tokens(name):
    module, method_settings = SELECTORS[name]
    for seed, (tokens, budget) in enumerate(random_cases(120)):
        indices, merged = choose(module, make_view(tokens, seed), budget, **method_settings)
        assert indices.shape == (budget,)
        assert (indices.diff() > 0).all() and (indices >= 0).all() and (indices < tokens).all()
        assert (merged is None) == (name in PRUNING)
        if merged is not None:
            assert merged.shape == (budget, DIM)
            assert merged.isfinite().all()


@pytest.mark.parametrize("name", SELECTORS)
def test_views_of_several_lengths_are_chosen_as_by_themselves(name):
    module, method_settings = SELECTORS[name]
    alone = [make_view(tokens, seed) for seed, tokens in enumerate((20, 31, 12))]
    lengths, counts = [20, 31, 12], [5, 9, 11]

    def padded(values):
        return torch.nn.utils.rnn.pad_sequence([value[0] for value in values], batch_first=True, padding_value=7.0)

    names = ("features", "projected", "attention", "joined_attention", "keys")
    tensors = {name: padded([getattr(context, name) for _, context in alone]) for name in names}
    settings = PruneSIDConfig()
    object.__setattr__(settings, "method_settings", method_settings)
    context = Context(counts=counts, lengths=lengths, **tensors)
    together = module.select(padded([view for view, _ in alone]), torch.tensor(counts), settings, context)
    assert together.indices.shape == (3, 11) and together.mask.sum(1).tolist() == counts
    assert (together.indices[~together.mask] == 31).all()
    for row, (view, count) in enumerate(zip(alone, counts)):
        indices, merged = choose(module, view, count, **method_settings)
        assert torch.equal(together.indices[row, :count], indices)
        assert merged is None or torch.equal(together.merged[row, :count], merged)


def test_random_choice_depends_on_the_picture_alone():
    view = make_view(60)
    before = torch.random.get_rng_state()
    first, _ = choose(random_choice, view, 20)
    rounded = view[0] * (1 + 1e-5 * torch.randn(view[0].shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(choose(random_choice, (rounded, view[1]), 20)[0], first)
    others = [choose(random_choice, make_view(60, seed), 20)[0] for seed in range(1, 300)]
    assert all(not torch.equal(first, other) for other in others)
    share = torch.stack(others).flatten().bincount(minlength=60) / len(others)
    assert (share - 1 / 3).abs().max() < 0.12


@pytest.mark.parametrize(("tokens", "budget"), random_cases(40))
def test_uniform_strides_are_even(tokens, budget):
    kept, _ = choose(uniform, make_view(tokens), budget)
    strides = kept.diff()
    assert ((strides == tokens // budget) | (strides == -(-tokens // budget))).all()
    assert abs(int(kept[0]) - (tokens - 1 - int(kept[-1]))) <= 1 + tokens / budget / 2


def test_hired_keeps_the_most_attended():
    for seed, (tokens, budget) in enumerate(random_cases(60)):
        view = make_view(tokens, seed)
        kept, _ = choose(hired, view, budget)
        others = torch.ones(tokens, dtype=torch.bool)
        others[kept] = False
        attention = view[1].attention[0]
        assert attention[kept].min() >= attention[others].max()
    assert highest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def chord(tokens):
    """Distances between directions. It is monotone in the cosine distance, and a metric."""
    units = nn.functional.normalize(tokens, dim=-1)
    return (2 - 2 * units @ units.T).clamp(min=0).sqrt()


def smallest(distances, chosen):
    return min(float(distances[i, j]) for i, j in itertools.combinations(chosen, 2))


def test_divprune_picks_greedily():
    for seed, (tokens, budget) in enumerate(random_cases(40)):
        features = torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(seed))
        distances = (1 - torch.cosine_similarity(features[:, None], features[None], dim=-1)).tolist()
        rest = set(range(tokens))
        chosen = [max(rest, key=lambda i: min(distances[i][j] for j in rest - {i}))]
        while len(chosen) < budget:
            chosen.append(max(rest - set(chosen), key=lambda i: min(distances[i][j] for j in chosen)))
        assert divprune.most_diverse(features, budget).tolist() == sorted(chosen)


@pytest.mark.parametrize("seed", range(30))
def test_divprune_is_within_a_factor_of_two_of_the_optimum(seed):
    features = torch.randn(9, DIM, generator=torch.Generator().manual_seed(seed))
    distances = chord(features)
    for budget in (2, 3, 4):
        optimum = max(smallest(distances, chosen) for chosen in itertools.combinations(range(9), budget))
        assert smallest(distances, divprune.most_diverse(features, budget).tolist()) >= optimum / 2 - 1e-6


def test_divprune_does_not_repeat_equal_tokens_before_all_others_are_kept():
    features = torch.eye(5).repeat_interleave(torch.tensor([4, 1, 3, 1, 1]), dim=0)
    assert len(features[divprune.most_diverse(features, 5)].unique(dim=0)) == 5


def test_divprune_compares_projected_tokens():
    features, context = view = make_view(30)
    expected = divprune.most_diverse(context.projected[0], 9)
    assert torch.equal(choose(divprune, view, 9)[0], expected)
    unprojected = divprune.most_diverse(features[0], 9)
    assert torch.equal(choose(divprune, (features, replace(context, projected=None)), 9)[0], unprojected)
    assert not torch.equal(unprojected, expected)


def log_volume(kernel, chosen):
    return float(torch.linalg.slogdet(kernel[chosen][:, chosen]).logabsdet)


def test_dpp_takes_the_token_that_adds_the_largest_volume():
    for seed, (tokens, budget) in enumerate(random_cases(30)):
        budget = min(budget, DIM)  # as many tokens as span the space
        features = torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(seed))
        kernel = dpp.similarities(features)
        chosen = []
        while len(chosen) < budget:
            rest = [token for token in range(tokens) if token not in chosen]
            gains = {token: log_volume(kernel, [*chosen, token]) for token in rest}
            chosen.append(max(rest, key=lambda token: round(gains[token], 9)))
        assert dpp.likeliest(kernel, budget).tolist() == sorted(chosen)


def test_dpp_begins_with_the_lower_tokens_where_all_are_spanned():
    features = torch.eye(3).repeat(4, 1)
    assert dpp.likeliest(dpp.similarities(features), 5).tolist() == [0, 1, 2, 3, 4]
    assert dpp.likeliest(dpp.similarities(features.flip(0)[:, [0, 2, 1]]), 3).tolist() == [0, 1, 2]
    assert dpp.likeliest(torch.zeros(4, 4, dtype=torch.double), 2).tolist() == [0, 1]


def test_dpp_compares_projected_tokens():
    features, context = view = make_view(30)
    projected = dpp.likeliest(dpp.similarities(context.projected[0]), 5)
    assert torch.equal(choose(dpp, view, 5)[0], projected)
    unprojected = dpp.likeliest(dpp.similarities(features[0]), 5)
    assert torch.equal(choose(dpp, (features, replace(context, projected=None)), 5)[0], unprojected)
    assert not torch.equal(unprojected, projected)


def test_cdpruner_weighs_the_kernel_by_relevance():
    for seed in range(20):
        context = make_view(20 + seed, seed)[1]
        words = torch.randn(1 + seed % 5, WIDTH, generator=torch.Generator().manual_seed(seed))
        features, projected = context.features[0], context.projected[0]
        means = [sum(float(torch.cosine_similarity(t, w, dim=0)) for w in words) / len(words) for t in projected]
        relevance = [(mean - min(means)) / (max(means) - min(means)) for mean in means]
        found = cdpruner.relevance(projected, words)
        assert found.tolist() == pytest.approx(relevance, abs=1e-4)
        unit = nn.functional.normalize(features.double(), dim=-1) * found[:, None]
        assert cdpruner.choose(features, projected, words, 5).tolist() == dpp.likeliest(unit @ unit.T, 5).tolist()
    assert cdpruner.relevance(projected, words[:0]).tolist() == [1.0] * len(projected)


def test_vispruner_keeps_the_important_half_and_removes_duplicates_of_the_rest():
    for seed, (tokens, budget) in enumerate(random_cases(60)):
        view = make_view(tokens, seed)
        attention, features = view[1].attention[0], view[1].features[0]
        ranked = sorted(range(tokens), key=lambda token: -float(attention[token]))
        important, rest = ranked[: budget // 2], ranked[budget // 2 :]
        while len(rest) > budget - budget // 2:
            removed = min(8, len(rest) - (budget - budget // 2))
            even, odd = rest[::2], rest[1::2]

            cosines = torch.cosine_similarity(features[even][:, None], features[odd][None], dim=-1)
            closest = dict(zip(even, cosines.max(1).values.tolist()))
            rest = sorted(even, key=lambda token, closest=closest: -closest[token])[removed:] + odd
        assert choose(vispruner, view, budget)[0].tolist() == sorted(important + rest)


def test_hiprune_keeps_anchors_their_neighbours_and_registers():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = 3 + seed % 9, 4 + seed % 7
        tokens = rows * columns
        budget = 1 + seed * (tokens - 1) // 40
        objects, all_over = (torch.rand(tokens, generator=generator) for _ in range(2))
        ranked = sorted(range(tokens), key=lambda token: -float(objects[token]))
        kept = set()
        for anchor in ranked[: round(0.1 * budget / 5)]:
            for neighbour in (anchor, anchor - 1, anchor + 1, anchor - columns, anchor + columns):
                kept.add(min(max(neighbour, 0), tokens - 1))
        others = sorted(set(range(tokens)) - kept, key=lambda token: -float(all_over[token]))
        expected = sorted([*kept, *others[: budget - len(kept)]])
        assert hiprune.select(objects, all_over, columns, budget).tolist() == expected
        assert len(expected) == budget


@pytest.mark.parametrize("vision", [{}, DINOV2], ids=["clip", "dinov2"])
def test_hiprune_reads_the_attention_that_patches_receive_in_two_layers(vision, monkeypatch):
    """The 2nd of 4 layers, and that of layer -2; mean over heads and queries of eager attention."""
    model, images = build(vision=vision), pixels(2)
    seen = []
    select = hiprune.select
    monkeypatch.setattr(hiprune, "select", lambda *given: seen.append(given) or select(*given))
    features_of(model, "hiprune", images)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tower(images, output_attentions=True).attentions
    for row, (objects, all_over, columns, budget) in enumerate(seen):
        assert (columns, budget) == (7, BUDGET)
        received = [attentions[layer][row].double().mean((0, 1))[1:] for layer in (1, 2)]
        torch.testing.assert_close(objects.double(), received[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(all_over.double(), received[1], rtol=1e-4, atol=1e-6)


def test_grids_have_whole_counts_in_the_shape_of_the_picture():
    counts = [math.prod(downsample.coarse_grid((24, 24), budget)) for budget in (192, 128, 64, 32, 16, 1)]
    assert counts == [196, 121, 64, 36, 16, 1]
    assert downsample.coarse_grid((12, 48), 36) == (3, 12)
    assert downsample.centres((7, 7), (3, 3)).tolist() == [8, 10, 12, 22, 24, 26, 36, 38, 40]
    assert downsample.centres((7, 7), (7, 7)).tolist() == list(range(49))


@pytest.mark.parametrize("vision", [{}, DINOV2], ids=["clip", "dinov2"])
def test_a_smaller_picture_is_read_by_the_tower_at_its_size(vision):
    model, images, near = build(vision=vision), pixels(2), {"rtol": 1e-4, "atol": 1e-5}
    found = features_of(model, "downsample-image", images, 16)
    small = nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    takes = {} if vision else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = model.model.vision_tower(small, output_hidden_states=True, **takes).hidden_states[-2][:, 1:]
        torch.testing.assert_close(torch.stack(found.pooler_output), model.model.multi_modal_projector(states), **near)
        large = nn.functional.interpolate(small, (28, 28), mode="bicubic", antialias=True)
        states = model.model.vision_tower(large, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = model.model.multi_modal_projector(states)
    torch.testing.assert_close(
        torch.stack(features_of(model, "downsample-enlarged", images, 16).pooler_output), expected, **near
    )


def test_features_are_averaged_over_cells():
    model, images = build(vision={"image_size": 32}), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        states = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][0, 1:].view(8, 8, -1)
        cells = [
            states[top : top + 2, left : left + 2].reshape(4, -1).mean(0)
            for top in (0, 2, 4, 6)
            for left in (0, 2, 4, 6)
        ]
        expected = model.model.multi_modal_projector(torch.stack(cells))
    found = features_of(model, "downsample-features", images, 16)
    torch.testing.assert_close(found.pooler_output[0], expected, rtol=1e-4, atol=1e-5)
    assert found.keep_indices[0][:3].tolist() == [9, 11, 13]


def zipped(view, num_dominant, num_contextual):
    _, context = view
    one = {name: getattr(context, name)[0] for name in ("features", "attention", "keys")}
    return visionzip.zip_tokens(Context(**one), num_dominant, num_contextual)


def test_visionzip_of_dominant_tokens_alone_is_top_attention():
    for seed, (tokens, budget) in enumerate(random_cases(60)):
        view = make_view(tokens, seed)
        indices, features = zipped(view, budget, 0)
        assert indices.tolist() == view[1].attention[0].topk(budget).indices.sort().values.tolist()
        assert torch.equal(features, view[1].features[0, indices])


@pytest.mark.parametrize(("budget", "dominant"), [(192, 162), (128, 108), (64, 54), (32, 27)])
def test_visionzip_splits_budgets_as_the_paper_does(budget, dominant):
    """CLS, which the model keeps besides, is one of the dominant tokens."""
    features, context = make_view(576)
    indices, merged = choose(visionzip, (features, replace(context, extra_kept=1)), budget - 1)
    unmerged = (merged == context.features[0, indices]).all(1)
    assert int(unmerged.sum()) == dominant - 1
    assert set(context.attention[0].topk(dominant - 1).indices.tolist()) == set(indices[unmerged].tolist())


@pytest.mark.parametrize(("tokens", "dominant", "contextual"), [(40, 6, 5), (23, 1, 7), (12, 4, 7), (30, 20, 1)])
def test_visionzip_merges_each_other_token_into_its_most_similar_target(tokens, dominant, contextual):
    view = make_view(tokens)
    own = view[1].features[0]
    indices, features = zipped(view, dominant, contextual)
    keys = view[1].keys[0].mean(1)
    kept = view[1].attention[0].topk(dominant).indices.tolist()
    rest = sorted(set(range(tokens)) - set(kept))
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    assert indices.tolist() == sorted(kept + targets)
    assigned = {target: [] for target in targets}
    for other in rest:
        if other not in targets:
            similarity = [float(torch.cosine_similarity(keys[other], keys[target], dim=0)) for target in targets]
            assigned[targets[similarity.index(max(similarity))]].append(own[other])
    for feature, token in zip(features, indices.tolist()):
        mean = torch.stack(assigned[token]).mean(0) if assigned.get(token) else 0
        torch.testing.assert_close(feature, own[token] + mean, rtol=1e-4, atol=1e-5)


def test_visionzip_dyn_gives_tokens_by_information():
    model, images = build(reference_information=0.7), pixels(14)
    tower = model.model.vision_tower
    with torch.no_grad():
        next(weight for name, weight in tower.named_parameters() if "position_embedding" in name).mul_(0.01)
    for row, image in enumerate(images):
        image[:, 2 * row :] = 1
    states = run_tower(tower, images, [3])[3][:, 1:]
    expected = information_budgets(redundancy(states), 20, NUM_PATCHES, 0.7, 2).tolist()
    found = features_of(model, "visionzip-dyn", images, 20)
    assert [len(view) for view in found.pooler_output] == expected
    assert all(indices[0] == -1 for indices in found.keep_indices)
    assert len(set(expected)) > 5


def test_prumerge_adds_nearest_others_and_the_rest():
    for seed, (tokens, budget) in enumerate(random_cases(20)):
        view = make_view(tokens, seed)
        own, keys, attention = view[1].features[0], view[1].keys[0].flatten(1), view[1].joined_attention[0]
        indices, features = choose(prumerge, view, budget)
        kept = attention.topk(budget - 1).indices.sort().values.tolist()
        rest = [token for token in range(tokens) if token not in kept]
        assert indices.tolist() == sorted([*kept, rest[-1]])
        for feature, token in zip(features, indices.tolist()):
            if token == rest[-1]:
                torch.testing.assert_close(feature, attention[rest] @ own[rest], rtol=1e-4, atol=1e-5)
                continue
            similarity = torch.cosine_similarity(keys, keys[token], dim=1)
            others = [other for other in similarity.argsort(descending=True).tolist() if other != token]
            added = sum(attention[other] * own[other] for other in others[:32])
            torch.testing.assert_close(feature, own[token] + added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vision", [{}, DINOV2], ids=["clip", "dinov2"])
def test_prumerge_reads_the_last_layer_with_all_heads_as_one(vision, monkeypatch):
    model, images, seen = build(vision=vision), pixels(2), []
    merge = prumerge.merge
    monkeypatch.setattr(prumerge, "merge", lambda context, kept: seen.append(context) or merge(context, kept))
    features_of(model, "prumerge", images)
    for image, context in zip(images, seen):
        block = tome.find_blocks(model.model.vision_tower)[-1]
        with torch.no_grad():
            states = run_tower(model.model.vision_tower, image[None], [2, 3])
            attention = getattr(block, "self_attn", None) or block.attention
            normed = (getattr(block, "layer_norm1", None) or block.norm1)(states[3])
            queries, keys = attention.q_proj(normed)[0], attention.k_proj(normed)[0]
        expected = (queries[0] @ keys.T / 32**0.5).softmax(-1)[1:]
        torch.testing.assert_close(context.joined_attention.double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(context.keys.flatten(1), keys[1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(context.features, states[3][0, 1:], rtol=1e-4, atol=1e-5)


def test_prumerge_plus_keeps_half_by_attention_and_half_evenly():
    for seed, (tokens, budget) in enumerate(random_cases(60)):
        view = make_view(tokens, seed)
        indices, _ = choose(prumerge, view, budget, strided=True)
        best = highest(view[1].joined_attention[0], budget // 2).tolist()
        others = [token for token in range(tokens) if token not in best]
        missing = budget - 1 - len(best)
        strided = [others[row * len(others) // missing] for row in range(missing)]
        kept = sorted([*best, *strided])
        last = max(token for token in range(tokens) if token not in kept)
        assert indices.tolist() == sorted([*kept, last])


def test_tome_merges_as_many_as_planned():
    for seed, (tokens, budget) in enumerate(random_cases(200)):
        blocks = 7 + seed % 17
        counts, left = tome.schedule(tokens, budget, blocks), tokens
        for count in counts:
            assert 0 <= count <= left // 2
            left -= count
        assert left == budget
    assert tome.schedule(576, 64, 11) == [47] * 6 + [46] * 5
    with pytest.raises(ValueError, match="budget=2 is too small for ToMe in 3 blocks, which leave 7 tokens"):
        tome.schedule(49, 2, 3)


@pytest.mark.parametrize("tokens", [10, 11, 50])
def test_tome_means_conserve_the_size_weighted_sum(tokens):
    generator = torch.Generator().manual_seed(tokens)
    merging = tome.Merging(3, tokens, torch.device("cpu"))
    states = torch.randn(3, tokens, DIM, generator=generator)
    sums, cls = states.sum(1), states[:, 0]
    while merging.sizes.shape[1] > 2:
        left = merging.sizes.shape[1]
        count = max((left - 1) // 3, 1)
        states = merging.merge(states, torch.randn(3, left, 5, generator=generator), count)
        assert states.shape == (3, left - count, DIM)
        assert merging.sizes.sum(1).tolist() == [tokens] * 3
        torch.testing.assert_close((states * merging.sizes[..., None]).sum(1), sums, rtol=1e-4, atol=1e-5)
    assert torch.equal(states[:, 0], cls)
    assert merging.places[:, 0].tolist() == [0] * 3


def test_tome_matches_the_best_pairs_of_alternating_tokens():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        tokens = 4 + seed
        metric = torch.randn(1, tokens, 5, generator=generator)
        count = int(torch.randint(1, (tokens - 1) // 2 + 1, (), generator=generator))
        similarity = torch.cosine_similarity(metric[0][:, None], metric[0][None], dim=-1)
        pairs = []
        for even in range(2, tokens, 2):
            partner = max(range(1, tokens, 2), key=lambda odd: float(similarity[even, odd]))
            pairs.append((float(similarity[even, partner]), even, partner))
        best = sorted(pairs, reverse=True)[:count]
        source, target, rest = tome.match(metric, count)
        assert list(zip(source[0].tolist(), target[0].tolist())) == [(even, partner) for _, even, partner in best]
        assert sorted([*source[0].tolist(), *rest[0].tolist()]) == list(range(tokens))


@pytest.mark.parametrize("vision", [{}, DINOV2], ids=["clip", "dinov2"])
def test_tome_block_without_merging_is_the_block_itself(vision):
    tower = build(vision=vision).model.vision_tower
    states = torch.randn(2, 10, 32, dtype=tower.dtype)
    for block in tome.find_blocks(tower):
        merging = tome.Merging(2, 10, states.device)
        expected = block(states, attention_mask=None)
        torch.testing.assert_close(merging.forward_of(block, 0)(states), expected, rtol=1e-4, atol=1e-5)


def test_tome_attention_counts_a_merged_token_as_often_as_it_stands_for():
    block = tome.find_blocks(build().model.vision_tower)[0]
    states, merging = torch.randn(1, 5, 32, dtype=torch.float64), tome.Merging(1, 5, torch.device("cpu"))
    merging.sizes[0, 2] = 3
    repeated = torch.cat([states, states[:, 2:3], states[:, 2:3]], dim=1)
    expected = block(repeated, attention_mask=None)[:, :5]
    torch.testing.assert_close(merging.forward_of(block, 0)(states), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vision", [{}, DINOV2], ids=["clip", "dinov2"])
def test_towers_give_the_queries_and_keys_of_the_attention(vision):
    tower = build(vision=vision).model.vision_tower
    states, cls = run_tower_with_cls(tower, pixels(2), [2], 3)
    block = tome.find_blocks(tower)[2]
    attention = getattr(block, "self_attn", None) or block.attention
    normed = (getattr(block, "layer_norm1", None) or block.norm1)(states[2])
    torch.testing.assert_close(cls.queries, attention.q_proj(normed), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cls.keys, attention.k_proj(normed), rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[{}, pytest.param(DINOV2, marks=pytest.mark.contract)], ids=["clip", "dinov2"])
def model(request):
    return build(budget=30, vision=request.param, reference_information=0.9)


def features_of(model, name, images, budget=BUDGET):
    with applied(model, name, budget) as run, torch.no_grad():
        output = model.get_image_features(pixel_values=images, return_dict=True)
    assert run.measured_tokens == sum(map(len, output.pooler_output)) / len(images)
    return output


@pytest.mark.parametrize("name", ENCODER_SIDE)
def test_a_batch_is_its_single_images(model, name):
    images = pixels(3)
    together = features_of(model, name, images)
    for row in range(3):
        alone = features_of(model, name, images[row : row + 1])
        assert torch.equal(together.keep_indices[row], alone.keep_indices[0])
        torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], rtol=1e-4, atol=1e-4)
        assert together.num_placeholders[row] == NUM_PATCHES
        if not name.endswith("-dyn"):
            assert len(together.pooler_output[row]) == GRIDS.get(name, BUDGET)


@pytest.mark.parametrize("name", ENCODER_SIDE)
def test_generate_reads_the_kept_tokens(model, name):
    """Two left-padded rows, one of them with two images: the stock class on short prompts with the same features."""
    images, texts = pixels(3), ([7, 8], [9, 10, 11])
    full = batch([prompt([NUM_PATCHES], texts[0]), prompt([NUM_PATCHES] * 2, texts[1])])
    encoded = features_of(model, name, images)
    counts = [len(view) for view in encoded.pooler_output]
    short = batch([prompt(counts[:1], texts[0]), prompt(counts[1:], texts[1])])
    features = BaseModelOutputWithPooling(pooler_output=encoded.pooler_output)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = stock_twin(model).generate(**short, mm_encoder_outputs={"image": features}, **settings)
    with applied(model, name, BUDGET):
        output = model.generate(**full, pixel_values=images, **settings)
    assert torch.equal(output[:, : full["input_ids"].shape[1]], full["input_ids"])
    assert torch.equal(output[:, full["input_ids"].shape[1] :], expected[:, short["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_restored(model, name):
    def state():
        modules = {path: set(vars(module)) for path, module in model.named_modules()}
        hooks = {path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in model.named_modules()}
        return modules, hooks, model.config.to_dict()

    inputs = {**batch([prompt([NUM_PATCHES], [7, 8])]), "pixel_values": pixels(1)}
    features_of(model, "full", pixels(1))  # Transformers adds its own hooks at the first full run
    with torch.no_grad():
        expected, before, own = model(**inputs).logits, state(), model.config.prunesid_config
        with applied(model, name, BUDGET):
            changed = model(**inputs).logits
        with pytest.raises(KeyError), applied(model, name, BUDGET):
            model(**inputs)
            raise KeyError
        assert state() == before
        assert model.config.prunesid_config is own
        assert torch.equal(model(**inputs).logits, expected)
    assert changed.shape != expected.shape or not torch.equal(changed, expected)


@pytest.mark.parametrize("name", [name for name in METHODS if not name.endswith("-dyn")])
def test_nothing_is_dropped_from_the_number_of_patches_on(model, name):
    inputs = {**batch([prompt([NUM_PATCHES], [7, 8])]), "pixel_values": pixels(1)}
    with torch.no_grad():
        expected = stock_twin(model)(**inputs).logits
        for budget in (NUM_PATCHES, 1.0, 1000):
            with applied(model, name, budget) as run:
                assert torch.equal(model(**inputs).logits, expected)
            assert run.measured_tokens == NUM_PATCHES


def test_presets_are_settings_of_prunesid(model):
    images = pixels(2)
    for name, settings in {
        "prunesid-paper": {},
        "prunesid-auto": {"nms_lambda": "auto"},
        "prunesid-spread": {"score": "cls_attention", "quota": "spread"},
        "prunesid-dyn": {"dynamic": True, "reference_information": 0.9},
        "prunesid-release": json.loads(RELEASE.read_text()),
    }.items():
        found = features_of(model, name, images)
        model.config.prunesid_config = PruneSIDConfig(**{**settings, "budget": BUDGET})
        expected = model.get_image_features(pixel_values=images, return_dict=True)
        model.config.prunesid_config = PruneSIDConfig(budget=30, reference_information=0.9)
        assert all(map(torch.equal, found.keep_indices, expected.keep_indices))


def test_methods_of_the_seam_run_in_qwen_vl():
    """Each picture keeps what the method keeps of the features that enter the language model."""
    model = tiny_qwen.build("Qwen2_5_VL")
    inputs = tiny_qwen.batch(
        "Qwen2_5_VL",
        tiny_qwen.prompt("Qwen2_5_VL", 7, ("image", (1, 8, 12)), 8),
        tiny_qwen.prompt("Qwen2_5_VL", ("image", (1, 4, 8)), ("image", (1, 8, 8)), 9, 10),
    )
    views = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    stock = tiny_qwen.stock_twin(model, "Qwen2_5_VL")
    with torch.no_grad():
        whole = stock.get_image_features(**views, return_dict=True).pooler_output
        for name in ("random", "uniform", "divprune", "dpp", "prunesid-paper", "prunesid-auto"):
            with applied(model, name, 6) as run:
                output = model.get_image_features(**views, return_dict=True)
                answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert run.tokens[:3] == [6.0] * 3 and answer.shape[1] == inputs["input_ids"].shape[1] + 3
            for features, kept, indices in zip(whole, output.pooler_output, output.keep_indices):
                if name in SELECTORS:  # the others compare tokens as they enter the merger
                    assert torch.equal(indices, choose(SELECTORS[name][0], (features[None], Context()), 6)[0])
                assert torch.equal(kept, features[indices])
        for name in ("hired", "vispruner", "visionzip", "prumerge"):
            needs = r"needs .*attention.* of a vision tower with a CLS token, which this model has not"
            own = model.config.prunesid_config
            with pytest.raises(ValueError, match=f"method='{name}' {needs}"), applied(model, name, 6):
                pass
            assert model.config.prunesid_config is own
    with pytest.raises(ValueError, match="must be a PruneSIDLlavaForConditionalGeneration for 'tome'"):
        applied(model, "tome", 6).__enter__()


@pytest.mark.parametrize("name", [name for name in ENCODER_SIDE if METHODS[name].any_family])
def test_methods_of_the_seam_choose_in_each_crop_of_llava_next(name):
    torch.manual_seed(0)
    config = PruneSIDLlavaNextConfig(
        vision_config=VISION,
        text_config=TEXT,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        prunesid_config={"budget": BUDGET, "reference_information": 0.9},
    )
    model = PruneSIDLlavaNextForConditionalGeneration(config).double().eval()
    crops, sizes = pixels(8).view(2, 4, 3, IMAGE_SIZE, IMAGE_SIZE)[:, :3], torch.tensor([[56, 28], [28, 50]])
    views = {"pixel_values": crops, "image_sizes": sizes}
    with torch.no_grad(), applied(model, name, BUDGET) as run:
        output = model.get_image_features(**views, return_dict=True)
    counts = [len(view) for view in output.pooler_output]
    assert run.tokens == counts
    if not name.endswith("-dyn"):
        assert counts == [3 * BUDGET] * 2
    for own, indices, padded in zip(output.pooler_output, output.keep_indices, (False, True)):
        assert own.isfinite().all() and len(indices.unique()) >= len(indices) - 2  # -1 is CLS, of each crop
        assert padded or not ((indices - NUM_PATCHES + 1) % 7 == 0).all()


@pytest.mark.contract
def test_a_model_carries_a_registered_method(tmp_path):
    """Saved, it has the method's file and no other's, and loads in a clean process without our package."""
    model, images = build(method="paper"), pixels(2)
    with registered(visionzip) as name:
        model.config.prunesid_config = PruneSIDConfig(budget=BUDGET, method=name)
        expected = model.get_image_features(pixel_values=images, return_dict=True).pooler_output
        model.save_pretrained(tmp_path / "repo")
    files = {path.name for path in (tmp_path / "repo").glob("*.py")}
    assert {file for file in files if file.startswith("method_")} == {"method_visionzip.py"}
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("repo", trust_remote_code=True, dtype=torch.float64)
assert "modeling_prunesid" not in sys.modules
with torch.no_grad():
    output = model.get_image_features(pixel_values=torch.load("images.pt"), return_dict=True)
torch.save(output.pooler_output, "out.pt")
model.save_pretrained("again")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=300)
    for kept, found in zip(expected, torch.load(tmp_path / "out.pt")):
        assert torch.equal(kept, found)
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == files
    with pytest.raises(ValueError, match="method must be one of .* got 'visionzip'.*register_method"):
        PruneSIDLlavaForConditionalGeneration.from_pretrained(tmp_path / "repo")


def test_a_method_that_cannot_travel_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name must be a Python name .* got 'dpp-2'"):
        register_method("dpp-2", dpp)
    with pytest.raises(ValueError, match="name must be a Python name and none of .*'paper'.* got 'paper'"):
        register_method("paper", dpp)
    with pytest.raises(
        ValueError, match="module 'prunesid_cli.*fastv' of method 'fastv' lacks select, needs, DEFAULTS"
    ):
        register_method("fastv", fastv)
    (tmp_path / "short_method.py").write_text(
        Path(uniform.__file__).read_text().replace("return middles", "return middles[1:]")
        + "from .dpp import likeliest\n"
    )
    sys.modules.pop("prunesid_cli.baselines.short_method", None)
    spec = importlib.util.spec_from_file_location("prunesid_cli.baselines.short_method", tmp_path / "short_method.py")
    module = sys.modules["prunesid_cli.baselines.short_method"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = build()
    with registered(module) as name:
        model.config.prunesid_config = PruneSIDConfig(budget=BUDGET, method=name)
        with pytest.raises(ValueError, match="imports dpp.py, which does not travel"):
            model.save_pretrained(tmp_path / "repo")
        with pytest.raises(ValueError, match=r"method='short_method' must choose 8 of 49 tokens, got .*\(7,\)"):
            model.get_image_features(pixel_values=pixels(1))
    assert name not in method_registry


def test_errors_name_what_is_wrong():
    model = build()
    with (
        pytest.raises(ValueError, match="name must be one of full, .*, got 'visionzap'"),
        applied(model, "visionzap", 8),
    ):
        pass
    with pytest.raises(ValueError, match="got LlavaForConditionalGeneration"), applied(stock_twin(model), "full", 8):
        pass
    for name in ("visionzip-dyn", "prunesid-dyn"):
        with pytest.raises(ValueError, match="reference_information"):
            features_of(model, name, pixels(1))
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="must be 'default', .* got 'full'"):
        features_of(model, "tome", pixels(1))
    model.config.vision_feature_select_strategy = "default"
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(ValueError, match="must be a single layer for ToMe"):
        features_of(model, "tome", pixels(1))


def cdpruner_alone(model, image, words):
    """The patches of one image, projected, that CDPruner keeps for the ids of one question, and their indices."""
    with torch.no_grad():
        features = model.model.vision_tower(image[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        projected = model.model.multi_modal_projector(features)
        indices = cdpruner.choose(features, projected, model.get_input_embeddings()(torch.tensor(words)), BUDGET)
        return projected[indices], indices.tolist()


def test_cdpruner_reads_the_question_of_each_prompt(model):
    """Padded rows with other questions about the same picture, with two pictures, and with none."""
    images, settings = pixels(3)[[0, 0, 1, 2]], {"max_new_tokens": 4, "do_sample": False}
    texts = ([7, 8], [9, 10, 11], [12, 13], [14, 15])
    pictures = ([0], [1], [2, 3], [])
    rows = [prompt([NUM_PATCHES] * len(own), text) for own, text in zip(pictures, texts)]
    expected = [cdpruner_alone(model, images[i], text) for own, text in zip(pictures, texts) for i in own]
    features = [kept for kept, _ in expected]
    assert expected[0][1] != expected[1][1]
    short = batch([prompt([BUDGET] * len(own), text) for own, text in zip(pictures, texts)])
    encoded = BaseModelOutputWithPooling(pooler_output=features)
    with torch.no_grad():
        logits = stock_twin(model)(**short, mm_encoder_outputs={"image": encoded}).logits[:, -1]
    answers = stock_twin(model).generate(**short, mm_encoder_outputs={"image": encoded}, **settings)[:, -4:]
    full = batch(rows)
    with applied(model, "cdpruner", BUDGET) as run, torch.no_grad():
        torch.testing.assert_close(model(**full, pixel_values=images).logits[:, -1], logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(**full, pixel_values=images, **settings)[:, -4:], answers)
        ids = full.pop("input_ids")
        torch.testing.assert_close(model(ids, **full, pixel_values=images).logits[:, -1], logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(ids, **full, pixel_values=images, **settings)[:, -4:], answers)
        with pytest.raises(
            ValueError, match="input_ids must hold the whole prompts of all 1 images .*, got those of 0"
        ):
            model.get_image_features(pixel_values=images[:1])
    assert run.measured_tokens == BUDGET


def make_row(visual, text, seed=0, num_images=1):
    """A random prompt: 3 words, `visual` visual tokens and `text` words in front of a layer."""
    generator = torch.Generator().manual_seed(seed)
    length = 3 + visual + text
    weights = torch.randn(length, length, generator=generator).softmax(-1)
    return Row(
        hidden_states=torch.randn(length, DIM, generator=generator),
        normed=torch.randn(length, DIM, generator=generator),
        rotated_keys=torch.randn(length, 2, 5, generator=generator),
        visual=torch.arange(3, 3 + visual),
        text=torch.arange(3 + visual, length),
        is_key=torch.rand(visual, generator=generator) < 0.1,
        num_images=num_images,
        entered=torch.randn(visual + seed % 5, DIM, generator=generator),
        words=torch.randn(text, DIM, generator=generator),
        attention=lambda places: weights[places],
    )


def test_settings_inside_the_language_model_are_the_papers():
    for method in (fastv, dart):
        assert [method.plan(budget, 576) for budget in (192, 128, 64)] == [{2: 166}, {2: 98}, {2: 30}]
    assert sparsevlm.plan(192, 576) == {3: 300, 7: 200, 16: 110}
    assert sparsevlm.plan(128, 576) == {3: 303, 7: 110, 16: 36}
    assert sparsevlm.plan(96, 576) == {3: 238, 7: 48, 16: 26}
    assert sparsevlm.plan(64, 576) == {3: 66, 7: 30, 16: 17}
    for budget, thresholds in ((192, (0.001, 0.001)), (128, (0.0012, 0.001)), (64, (0.011, 0.01))):
        planned = mustdrop.plan(budget, 576)
        assert list(planned) == [3, 7, 11, 15]
        assert all(stage.thresholds == thresholds and stage.budget == budget for stage in planned.values())
    assert [scaled_layer(2, layers) for layers in (2, 4, 16, 24, 32, 40)] == [1, 1, 1, 2, 2, 3]
    assert [scaled_layer(layer, 32) for layer in (2, 3, 7, 16)] == [2, 3, 7, 16]


def test_other_budgets_lie_between_the_published_ones():
    assert sparsevlm.plan(112, 576) == {3: 270, 7: 79, 16: 31}
    assert sparsevlm.plan(32, 576) == {3: 33, 7: 15, 16: 8}
    assert sparsevlm.plan(16, 144) == {3: 16, 7: 8, 16: 4}
    assert sparsevlm.plan(1, 576) == {3: 1, 7: 1, 16: 1}
    assert sparsevlm.plan(384, 576) == {3: 438, 7: 388, 16: 343}


def test_fastv_keeps_the_order_of_what_the_last_token_attends_to_most():
    for seed, (tokens, count) in enumerate(random_cases(60)):
        row = make_row(tokens, seed % 3, seed)
        states, kept = fastv.choose(row, count)
        others = row.visual[~torch.isin(row.visual, kept)]
        attention = row.attention(torch.tensor([2 + tokens + seed % 3]))[0]
        assert len(kept) == count
        assert (kept.diff() > 0).all()
        assert torch.isin(kept, row.visual).all()
        assert attention[kept].min() >= attention[others].max()
        assert torch.equal(states, row.hidden_states[kept])


@pytest.mark.parametrize(("tokens", "text", "count"), [(60, 9, 20), (60, 2, 29), (30, 4, 28), (40, 6, 3), (12, 5, 12)])
def test_dart_takes_what_is_least_similar_to_each_pivot_in_turn(tokens, text, count):
    row = make_row(tokens, text)
    norms = row.rotated_keys.abs().sum((1, 2)).tolist()
    images = sorted(row.visual.tolist(), key=lambda place: -norms[place])[:4]
    texts = sorted(row.text.tolist(), key=lambda place: -norms[place])[:4]
    pool, kept, each = set(row.visual.tolist()) - set(images), set(images), max(round((count - 4) / 8), 0)
    for pivot in images + texts:
        similarity = torch.cosine_similarity(row.normed, row.normed[pivot], dim=1).tolist()
        taken = sorted(pool, key=lambda place: similarity[place])[:each]
        pool, kept = pool - set(taken), kept | set(taken)
    states, places = dart.choose(row, count)
    assert places.tolist() == sorted(kept)
    assert torch.equal(states, row.hidden_states[places])
    assert len(kept) == min(4 + (4 + min(text, 4)) * each, tokens)


def test_sparsevlm_lets_the_words_rate_that_visual_tokens_point_to():
    for seed in range(30):
        row = make_row(20 + seed, 1 + seed % 7, seed)
        shares = []
        for token in row.entered:
            products = [math.exp(float(token @ word)) for word in row.words]
            shares.append([product / sum(products) for product in products])
        means = [sum(column) / len(shares) for column in zip(*shares)]
        expected = [place for place, mean in zip(row.text.tolist(), means) if mean > 1 / len(means) + 1e-6]
        assert sparsevlm.find_raters(row).tolist() == (expected or row.text.tolist())
    assert sparsevlm.find_raters(make_row(9, 0)).tolist() == [11]


def test_sparsevlm_keeps_the_best_rated_and_recycles_the_best_of_the_rest():
    for seed, (tokens, count) in enumerate(random_cases(60)):
        row = make_row(tokens, seed % 6, seed)
        scores = row.attention(sparsevlm.find_raters(row)).mean(0)
        ranked = sorted(row.visual.tolist(), key=lambda place: -float(scores[place]))
        num_recycled = int(0.3 * (tokens - count)) + 1
        num_clusters = num_recycled // 10 + 1
        states, places = sparsevlm.choose(row, count)
        assert len(places) == count + num_clusters
        assert (places.diff() > 0).all()
        assert set(ranked[:count]) <= set(places.tolist())
        peaks = sorted(set(places.tolist()) - set(ranked[:count]))
        recycled = ranked[count : count + num_recycled]
        assert set(peaks) <= set(recycled)
        members = {peak: [] for peak in peaks}
        for place in recycled:
            distances = [float((row.hidden_states[place] - row.hidden_states[peak]).norm()) for peak in peaks]
            members[peaks[distances.index(min(distances))]].append(row.hidden_states[place])
        for state, place in zip(states, places.tolist()):
            expected = torch.stack(members[place]).mean(0) if place in members else row.hidden_states[place]
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_sparsevlm_takes_for_peaks_what_is_dense_and_far_from_any_denser_token():
    for seed in range(20):
        count = 2 + seed % 3
        tokens = torch.randn(10 * count + seed, DIM, generator=torch.Generator().manual_seed(seed))
        distances = [[float((a - b).norm()) / DIM**0.5 for b in tokens] for a in tokens]
        density = [math.exp(-sum(d**2 for d in sorted(row)[:count]) / count) for row in distances]
        farthest = max(map(max, distances))
        score = []
        for i, row in enumerate(distances):  # mutual neighbours are equally dense
            is_denser = [other > density[i] or (other == density[i] and j < i) for j, other in enumerate(density)]
            score.append(density[i] * min((d for d, denser in zip(row, is_denser) if denser), default=farthest))
        expected = sorted(range(len(tokens)), key=lambda i: -score[i])[:count]
        assert sparsevlm.cluster_means(tokens, count)[1].tolist() == expected


def test_sparsevlm_ranks_densities_that_float32_cannot_hold():
    """Tokens so far apart that a third of the densities are 0 in float32: the peaks are those of float64."""
    tokens = torch.randn(30, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distances = 15 * torch.cdist(tokens, tokens) / DIM**0.5
    density = (-distances.topk(3, largest=False).values.square().mean(1)).exp()
    assert (density.float() == 0).sum() >= 10 and (density > 0).all()
    score = [
        float(density[i]) * min((float(distances[i, j]) for j in range(30) if density[j] > density[i]), default=1e9)
        for i in range(30)
    ]
    expected = sorted(range(30), key=lambda i: -score[i])[:3]
    assert sparsevlm.cluster_means((15 * tokens).float(), 3)[1].tolist() == expected


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (3, 8), (6, 9), (2, 9)])
def test_mustdrop_merges_windows_of_similar_patches(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randn(rows, columns, DIM, generator=generator)
    tokens[:3, 3:6] = tokens[:1, 3:4] + 0.1 * tokens[:3, 3:6]  # a uniform window, if there are three rows
    expected, places = [], []
    for row, column in itertools.product(range(rows), range(columns)):
        top, left = row // 3 * 3, column // 3 * 3
        window = tokens[top : top + 3, left : left + 3].reshape(-1, DIM)
        pairs = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(window, 2)]
        is_merged = len(window) == 9 and sum(pairs) / len(pairs) >= 0.8
        if not is_merged or (row - top, column - left) == (1, 1):
            expected.append(window.mean(0) if is_merged else tokens[row, column])
            places.append(row * columns + column)
    states, found = mustdrop.merge_windows(tokens.view(-1, DIM), columns)
    assert found.tolist() == places
    assert len(places) == rows * columns - (8 if rows >= 3 else 0)
    torch.testing.assert_close(states, torch.stack(expected), rtol=1e-4, atol=1e-5)


def published_filter(weights, is_key, thresholds):
    """MustDrop's rule, token by token: what is below both thresholds goes."""
    total = float(weights.sum())
    return [
        bool(key) or float(column.sum()) >= thresholds[0] * total or float(column.max()) >= thresholds[1]
        for column, key in zip(weights.T, is_key)
    ]


def test_mustdrop_filters_by_the_published_thresholds_times_a_factor():
    for seed, (tokens, budget) in enumerate(random_cases(60)):
        row = make_row(tokens, seed % 4, seed)
        stage = mustdrop.plan(budget, tokens)[3 + 4 * (seed % 4)]
        states, places = mustdrop.choose(row, stage)
        kept = torch.isin(row.visual, places)
        share = mustdrop.filter_share(budget / len(row.entered))
        assert len(places) == max(round(len(row.entered) * share**stage.number), int(row.is_key.sum()), 1)
        assert kept[row.is_key].all()
        assert torch.equal(states, row.hidden_states[places])
        weights = row.attention(row.readers)[:, row.visual]
        above = mustdrop.margins(weights, stage.thresholds)
        assert (above >= 1).tolist() == published_filter(weights, torch.zeros(tokens), stage.thresholds)
        if not kept.all() and (kept & ~row.is_key).any():
            factor = float(above[kept & ~row.is_key].min()) * (1 - 1e-6)
            scaled = tuple(threshold * factor for threshold in stage.thresholds)
            assert kept.tolist() == published_filter(weights, row.is_key, scaled)


def test_mustdrop_filters_leave_the_same_share_each():
    for target in (0.1, 0.2, 1 / 3, 0.7, 1.0):
        left = [0, 1, 2, 3, 4]
        shares = [mustdrop.filter_share(target) ** stage for stage in left]
        layers = [shares[sum(layer >= start for start in mustdrop.LAYERS)] for layer in range(32)]
        assert sum(layers) / 32 == pytest.approx(target)
    assert mustdrop.filter_share(0.05) == pytest.approx(0, abs=1e-9)
    assert mustdrop.filter_share(1.5) == 1


# Random towers make no patches that are alike by the published measure.
ALIKE_IN_CLIP, ALIKE_IN_DINOV2 = 0.1, 0.18


@pytest.mark.parametrize(
    ("vision", "similarity"), [({}, ALIKE_IN_CLIP), (DINOV2, ALIKE_IN_DINOV2)], ids=["clip", "dinov2"]
)
def test_mustdrop_key_tokens_are_what_cls_attends_to_most(vision, similarity, monkeypatch):
    monkeypatch.setattr(mustdrop, "SIMILARITY", similarity)
    model, images = build(vision=vision), pixels(3)
    with encoder_method(mustdrop.encode)(model, BUDGET), torch.no_grad():
        output = model.get_image_features(pixel_values=images, return_dict=True)
    assert len({len(view) for view in output.pooler_output}) > 1
    for image, places, is_key in zip(images, output.keep_indices, output["is_key"]):
        assert int(is_key.sum()) == -(-8 * len(places) // 100)
        blocks = tome.find_blocks(model.model.vision_tower)
        with torch.no_grad():
            states = run_tower(model.model.vision_tower, image[None], [0])[0]
            states = blocks[0](states, attention_mask=None)
            merged, expected = mustdrop.merge_windows(states[0, 1:], 7)
            assert torch.equal(places, expected)
            states = torch.cat([states[:, :1], merged[None]], dim=1)
            for block in blocks[1:-1]:
                states = block(states, attention_mask=None)
            attention = getattr(blocks[-1], "self_attn", None) or blocks[-1].attention
            normed = (getattr(blocks[-1], "layer_norm1", None) or blocks[-1].norm1)(states)
            queries, keys = (
                part(normed)[0].view(-1, HEADS, 32 // HEADS) for part in (attention.q_proj, attention.k_proj)
            )
        weights = (torch.einsum("hd,lhd->hl", queries[0], keys) * (32 // HEADS) ** -0.5).softmax(-1).mean(0)[1:]
        assert weights[is_key].min() >= weights[~is_key].max()


@pytest.mark.parametrize("grouped", [2, 4], ids=["grouped keys", "a key a head"])
def test_the_rows_of_attention_are_those_of_eager_attention(grouped):
    model = build(text={"num_key_value_heads": grouped})
    inputs = batch([prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES], [9, 10, 11, 12])])
    found = []

    def rule(row, setting):
        found.append(row.attention(row.text[-2:]))
        return row.keep(row.visual[:setting])

    stock = stock_twin(model)
    stock.set_attn_implementation("eager")
    with torch.no_grad(), llm_method(lambda budget, patches: {2: budget}, rule)(model, BUDGET):
        model(**inputs, pixel_values=pixels(2))
        expected = stock(**inputs, pixel_values=pixels(2), output_attentions=True).attentions[0]
    torch.testing.assert_close(torch.stack(found).double(), expected[:, :, -2:].mean(1), rtol=1e-4, atol=1e-6)


def test_dart_ranks_keys_as_the_cache_holds_them():
    """Rotation keeps L2 norms and changes L1 norms, so that other tokens become pivots."""
    model = build()
    inputs = batch([prompt([NUM_PATCHES], [7, 8, 9]), prompt([NUM_PATCHES], [9, 10, 11, 12])])
    found = []

    def rule(row, setting):
        found.append(row.rotated_keys)
        return row.keep(row.visual[:setting])

    with torch.no_grad(), llm_method(lambda budget, patches: {2: budget}, rule)(model, BUDGET):
        output = model(**inputs, pixel_values=pixels(2), use_cache=True)
    cache = output.get("cache") or output.past_key_values  # its name from Transformers 5.24 on
    torch.testing.assert_close(torch.stack(found), cache.layers[0].keys.transpose(1, 2), rtol=1e-4, atol=1e-5)


def run_together_and_alone(name, model, images):
    """The answers and tokens of a left-padded batch, one row with two images and one with none, and of its rows."""
    settings = {"max_new_tokens": 4, "do_sample": False}
    rows = [prompt([NUM_PATCHES], [7, 8, 9, 10]), prompt([NUM_PATCHES] * 2, [9, 10, 11, 12, 13]), [1, 20, 21]]
    views = [{"pixel_values": images[:1]}, {"pixel_values": images[1:]}, {}]
    with applied(model, name, 20) as run:
        together = model.generate(**batch(rows), pixel_values=images, **settings)
    answers, tokens = [], []
    for row, view in zip(rows, views):
        with applied(model, name, 20) as alone:
            answers.append(model.generate(**batch([row]), **view, **settings)[0, -4:])
        tokens += alone.tokens
    return (together[:, -4:], run.tokens), (torch.stack(answers), tokens)


@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize("name", LLM_SIDE)
def test_a_batch_inside_the_language_model_is_its_single_prompts(name, layers, monkeypatch):
    monkeypatch.setattr(mustdrop, "SIMILARITY", ALIKE_IN_CLIP)
    model = build(text={"num_hidden_layers": layers})
    (together, tokens), (alone, tokens_alone) = run_together_and_alone(name, model, pixels(3))
    assert torch.equal(together, alone)
    assert tokens == pytest.approx(tokens_alone)
    assert max(tokens) < NUM_PATCHES


@pytest.mark.parametrize(("name", "behind"), [("fastv", [18, 36]), ("dart", [20, 36])])
def test_tokens_dropped_inside_the_language_model_are_measured_over_its_layers(name, behind):
    (_, tokens), _ = run_together_and_alone(name, build(), pixels(3))
    assert tokens[0] == (NUM_PATCHES + behind[0]) / 2
    assert tokens[1] + tokens[2] == NUM_PATCHES + behind[1] / 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fastv", [192, 128, 64]), ("sparsevlm-v1.5", [206, 145, 82]), ("mustdrop", [192, None, None])],
)
def test_means_in_the_depth_that_settings_are_stated_for(name, expected):
    """The figures of methods.md for 576 patches and 32 layers. MustDrop's key tokens alone are more than 128."""
    model = build(None, vision={"image_size": 96}, text={"num_hidden_layers": 32, "max_position_embeddings": 1024})
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    inputs = batch([prompt([576], [7, 8, 9])])
    for budget, mean in zip((192, 128, 64), expected):
        with torch.no_grad(), applied(model, name, budget) as run:
            model(**inputs, pixel_values=images)
        if mean is not None:
            assert run.measured_tokens == pytest.approx(mean, abs=0.6)
        else:
            assert (3 * 576 + 29 * 47) / 32 <= run.measured_tokens < 192


def test_a_stock_checkpoint_in_our_class_is_accepted(tmp_path):
    model = build(None)
    stock_twin(model).save_pretrained(tmp_path)
    loaded = PruneSIDLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert len(features_of(loaded, "visionzip", pixels(1)).pooler_output[0]) == BUDGET
