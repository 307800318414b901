"""Towers run no further than needed, and give what a full run with every output gives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import BUDGET, NUM_PATCHES, build, pixels, prompt, stock_twin
from tiny_towers import SIGLIP, TOWERS, WITH_CLS, build_tower

from modeling_prunesid.layers import resolve_layer
from modeling_prunesid.select_tokens import select_tokens
from prunesid_cli.towers import run_tower, run_tower_with_cls


def count_runs(tower):
    """How often each layer of a tower runs from now on."""
    layers = next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4)
    runs = [0] * len(layers)

    def count(index):
        def hook(module, args, output):
            runs[index] += 1

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(count(index))
    return runs


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", range(5))
def test_a_hidden_state_is_that_of_a_full_run(tower, layer):
    model = build_tower(tower)
    expected = model(pixels(2), output_hidden_states=True).hidden_states[layer]
    assert torch.equal(run_tower(model, pixels(2), [layer])[layer], expected)


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_layers_behind_the_last_one_needed_do_not_run(tower):
    model = build_tower(tower)
    runs = count_runs(model)
    states = run_tower(model, pixels(1), [1, 2])
    assert set(states) == {1, 2}
    assert runs == [1, 1, 0, 0]
    model(pixels(1))
    assert runs == [2, 2, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("tower", WITH_CLS)
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_the_cls_attention_is_that_of_eager_attention(tower, layer):
    got = run_tower_with_cls(build_tower(tower), pixels(2), [], layer)[1].cls_attention
    eager = build_tower(tower, "eager")
    expected = eager(pixels(2), output_attentions=True).attentions[layer - 1][:, :, 0].sum(1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cls_attention_in_half_precision_is_float32():
    tower = build_tower("clip").to(torch.bfloat16)
    got = run_tower_with_cls(tower, pixels(1).to(torch.bfloat16), [], 3)[1].cls_attention
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.sum(1), torch.tensor([4.0]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_hidden_states_on_request():
    model = build()
    runs = count_runs(model.model.vision_tower)
    output = model.get_image_features(pixels(1), output_hidden_states=True)
    assert len(output.hidden_states) == 5 and runs == [1, 1, 1, 1]
    plain = model.get_image_features(pixels(1))
    assert plain.get("hidden_states") is None and torch.equal(plain.pooler_output[0], output.pooler_output[0])


def test_the_embeddings_have_no_attention():
    with pytest.raises(ValueError, match=r"prunesid_config.layer=0.*Name a later layer.*'score': 'component'"):
        run_tower_with_cls(build_tower("clip"), pixels(1), [], 0)


def test_no_hook_stays_after_an_error():
    tower = build_tower("clip")
    with pytest.raises(ValueError):
        run_tower_with_cls(tower, pixels(1)[..., :8], [], 2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tower.modules())
    runs = count_runs(tower)
    tower(pixels(1))
    assert runs == [1, 1, 1, 1]


@torch.no_grad()
def test_threads_share_a_tower():
    tower = build_tower("clip")
    images = [pixels(1, seed) for seed in range(24)]
    layers = [1 + seed % 4 for seed in range(24)]
    expected = [run_tower_with_cls(tower, image, [], layer) for image, layer in zip(images, layers)]
    barrier = threading.Barrier(4)

    def work(worker):
        barrier.wait()
        return [(seed, run_tower_with_cls(tower, images[seed], [], layers[seed])) for seed in range(worker, 24, 4)]

    with ThreadPoolExecutor(4) as pool:
        results = [result for part in pool.map(work, range(4)) for result in part]
    for seed, (states, cls) in results:
        assert torch.equal(states[layers[seed]], expected[seed][0][layers[seed]])
        assert torch.equal(cls.cls_attention, expected[seed][1].cls_attention)


@pytest.mark.parametrize("layer, expected", [(-1, 4), (-2, 3), (-5, 0), (0, 0), (4, 4)])
def test_layers_count_from_both_ends(layer, expected):
    assert resolve_layer(layer, 4, "layer") == expected


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_does_not_exist(layer):
    with pytest.raises(ValueError, match=rf"layer must lie in \[-5, 4\].*got {layer}"):
        resolve_layer(layer, 4, "layer")


class TestLlavaOnOtherTowers:
    """The stock processor writes 49 patches, and CLS and registers besides where the strategy feeds them."""

    @pytest.mark.parametrize(
        "tower, strategy, total, extra",
        [
            ("clip", "default", NUM_PATCHES, 0),
            ("clip", "full", NUM_PATCHES + 1, 1),
            ("dinov2", "default", NUM_PATCHES, 0),
            ("registers", "default", NUM_PATCHES + 4, 4),
            ("registers", "full", NUM_PATCHES + 5, 5),
            ("siglip", "full", NUM_PATCHES, 0),
        ],
    )
    def test_full_and_short_prompts(self, tower, strategy, total, extra):
        model = build(vision=TOWERS[tower])
        model.config.vision_feature_select_strategy = strategy
        output = model.get_image_features(pixels(2))
        assert output.num_placeholders == [total] * 2
        for kept in output.keep_indices:
            assert len(kept) == BUDGET
            assert kept[:extra].tolist() == list(range(extra))
        kwargs = {"pixel_values": pixels(2), "max_new_tokens": 4, "do_sample": False}
        full = model.generate(torch.tensor([prompt([total] * 2, [7])]), **kwargs)
        short = model.generate(torch.tensor([prompt([BUDGET] * 2, [7])]), **kwargs)
        assert torch.equal(full[:, -4:], short[:, -4:])
        model.config.prunesid_config.budget = None
        assert model.generate(torch.tensor([prompt([total] * 2, [7])]), **kwargs).shape == full.shape

    def test_cls_attention_needs_a_cls_token(self):
        model = build(vision=SIGLIP, score="cls_attention")
        with pytest.raises(ValueError, match="by CLS attention, need a vision tower with a CLS token"):
            model.get_image_features(pixels(1), vision_feature_select_strategy="full")

    def test_spread_measures_distances_where_the_language_model_gets_the_tokens(self):
        model = build(quota="spread")
        stock = stock_twin(model).model
        states = stock.vision_tower(pixels(2), output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = torch.stack([stock.multi_modal_projector(view) for view in states])
        expected = select_tokens(states, BUDGET, quota="spread", projected=projected).indices
        assert torch.equal(torch.stack(model.get_image_features(pixels(2)).keep_indices), expected)
        assert not torch.equal(expected, select_tokens(states, BUDGET, quota="spread").indices)

    @pytest.mark.parametrize("tower", WITH_CLS)
    def test_the_release_preset(self, tower):
        model = build(vision=TOWERS[tower], score="cls_attention", center="features", quota="bounded", keep_cls=True)
        output = model.get_image_features(pixels(2))
        assert all(len(kept) == BUDGET and kept[0] == -1 for kept in output.keep_indices)
