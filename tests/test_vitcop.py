"""ViTCoP: each stage against loops over numbers, and the model against a naive run without a cache."""

import json
from pathlib import Path

import pytest
import torch
from tiny import IMAGE, NUM_PATCHES, batch, build, build_layer_pruned, pixels, prompt, stock_twin
from tiny_vitcop import (
    BUDGET,
    CENTER_SHARE,
    KEEP_SHARE,
    NUM_LAYERS,
    build_vitcop,
    naive_clusters,
    naive_features,
    naive_logits,
    naive_merge,
)
from transformers import DynamicCache

from modeling_prunesid import LayerPrunedLlavaConfig, PruneSIDLlavaConfig, PruneSIDLlavaNextConfig, ViTCoPConfig
from modeling_prunesid.upstream import CACHE_NAME, cache_of
from modeling_prunesid.vitcop import (
    cluster_quotas,
    cluster_tokens,
    count_of_share,
    default_shares,
    keep_smallest,
    merge_clusters,
    plan_counts,
    scaled_layers,
    select_salient,
)


GREEDY = {"max_new_tokens": 6, "do_sample": False}
PUBLISHED = {192: (0.5, 0.18, 288, 253, 51), 128: (0.4, 0.15, 230, 165, 33), 64: (0.3, 0.12, 172, 77, 15)}
PRESETS = Path(__file__).parents[1] / "configuration"


def random_labels(generator, tokens, clusters):
    """Clusters of uneven sizes, none of them empty."""
    labels = torch.randint(0, clusters, (tokens,), generator=generator) ** 2 // max(clusters - 1, 1)
    labels[torch.randperm(tokens, generator=generator)[:clusters]] = torch.arange(clusters)
    return labels.clamp(max=clusters - 1)


class TestStages:
    @pytest.mark.parametrize("seed", range(40))
    def test_clusters_are_those_of_the_loops(self, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = int(torch.randint(1, 40, (), generator=generator))
        centers = int(torch.randint(1, tokens + 1, (), generator=generator))
        scale = (0.5, 2.0, 8.0)[seed % 3]
        keys = torch.randn(tokens, 6, generator=generator) * scale
        positions = torch.rand(tokens, 2, generator=generator)
        expected = naive_clusters(keys.double().tolist(), positions.double().tolist(), centers)
        assert cluster_tokens(keys, positions, centers).tolist() == expected

    def test_tokens_that_no_centre_reaches_are_one_cluster(self):
        """Two far corners: every corner has its densest token, and one centre reaches only its own."""
        keys = torch.tensor([[0.0], [0.1], [0.2], [30.0], [30.5]])
        positions = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.1, 0.0], [0.9, 0.9], [0.9, 0.8]])
        assert cluster_tokens(keys, positions, 1).tolist() == [0, 0, 0, 1, 1]

    def test_equal_tokens_do_not_loop_forever(self):
        labels = cluster_tokens(torch.zeros(9, 4), torch.zeros(9, 2), 2)
        assert labels.tolist() == naive_clusters([[0.0] * 4] * 9, [[0.0] * 2] * 9, 2)

    @pytest.mark.parametrize("seed", range(60))
    def test_merges_are_those_of_the_loops(self, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = int(torch.randint(1, 50, (), generator=generator))
        clusters = int(torch.randint(1, tokens + 1, (), generator=generator))
        count = int(torch.randint(1, tokens + 2, (), generator=generator))
        labels = random_labels(generator, tokens, clusters)
        states = torch.randn(tokens, 5, generator=generator)
        norms = torch.rand(tokens, generator=generator)
        more = seed % 2  # one cluster more than there are
        got, places = merge_clusters(states, norms, labels, count, clusters + more)
        expected, expected_places = naive_merge(states, norms.double().tolist(), labels.tolist(), count)
        assert places.tolist() == expected_places
        assert len(places) == min(count, tokens)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("seed", range(40))
    def test_quotas_leave_exactly_the_count(self, seed):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 30, (1 + seed % 9,), generator=generator).tolist()
        count = int(torch.randint(len(sizes), sum(sizes), (), generator=generator)) if sum(sizes) > len(sizes) else 0
        if count:
            sums = torch.rand(len(sizes), generator=generator)
            quotas = cluster_quotas(torch.tensor(sizes), sums, sum(sizes), count).tolist()
            padded = torch.tensor([*sizes, 0]), torch.cat([sums, torch.zeros(1)])
            assert cluster_quotas(*padded, sum(sizes), count).tolist() == [*quotas, 0]
            assert sum(quotas) + len(sizes) == count
            assert all(0 <= quota < size for quota, size in zip(quotas, sizes))

    def test_quotas_are_corrected_by_the_sums_of_norms(self):
        """Shares of 1.5 are rounded to 2, one too many; shares of 0.5 to 0, one too few."""

        def quotas(sizes, sums, count):
            return cluster_quotas(torch.tensor(sizes), torch.tensor(sums), sum(sizes), count).tolist()

        assert quotas([4, 4, 4, 4], [3.0, 9.0, 1.0, 2.0], 4 + 6) == [1, 1, 2, 2]
        assert quotas([3, 3], [3.0, 9.0], 2 + 1) == [1, 0]
        assert quotas([3, 3], [9.0, 3.0], 2 + 1) == [0, 1]

    def test_the_middle_of_an_even_group_is_the_later_token(self):
        states = torch.eye(4)
        merged, places = merge_clusters(states, torch.ones(4), torch.zeros(4, dtype=torch.long), 1, 1)
        assert places.tolist() == [2]
        assert torch.equal(merged[0], states[2] + 1 / 4)

    def test_salient_and_smallest_keep_the_first_of_equals_in_order(self):
        values = torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0])
        assert select_salient(values, 3).tolist() == [1, 2, 3]
        assert select_salient(values, 1).tolist() == [1]
        assert keep_smallest(values, 1).tolist() == [0]
        assert keep_smallest(values, 3).tolist() == [0, 2, 4]


class TestCounts:
    @pytest.mark.parametrize("budget", PUBLISHED)
    def test_at_the_published_settings_they_are_the_papers(self, budget):
        keep_share, center_share, entering, left, last = PUBLISHED[budget]
        assert scaled_layers(32) == (2, 22)
        defaults = default_shares(budget / 576, 32, 2, 22)
        assert defaults == pytest.approx((keep_share, center_share))
        for share in (keep_share, defaults[0]):
            assert count_of_share(share, 576) == entering
        assert plan_counts(budget, entering, 32, 2, 22) == (left, last)
        mean = (2 * entering + 20 * left + 10 * last) / 32
        assert mean == pytest.approx(budget, rel=0.01)

    @pytest.mark.parametrize("num_layers", [24, 26, 28, 32, 36, 40, 48, 64, 80])
    @pytest.mark.parametrize("tokens", [256, 576, 729, 1024])
    def test_the_mean_is_the_target_at_any_depth_and_grid(self, num_layers, tokens):
        first, second = scaled_layers(num_layers)
        for share in (1 / 9, 2 / 9, 1 / 3, 0.5, 0.7):
            target = round(share * tokens)
            entering = count_of_share(default_shares(share, num_layers, first, second)[0], tokens)
            left, last = plan_counts(target, entering, num_layers, first, second)
            assert entering >= left >= last >= 1
            mean = (first * entering + (second - first) * left + (num_layers - second) * last) / num_layers
            # Whole tokens: a last count that is rounded by a half moves the mean by as much over the last layers.
            assert abs(mean - target) <= max(0.01 * target, 0.51)

    @pytest.mark.parametrize("num_layers", [2, 3, 4, 7, 24, 32, 80])
    def test_by_default_every_budget_can_be_met(self, num_layers):
        first, second = scaled_layers(num_layers)
        for tokens in (49, 576):
            for target in range(1, tokens):
                entering = count_of_share(default_shares(target / tokens, num_layers, first, second)[0], tokens)
                left, last = plan_counts(target, entering, num_layers, first, second)
                assert tokens >= entering >= left >= last >= 1
                assert entering >= target
                assert left >= int(entering * 77 / 172)

    def test_below_the_published_budgets_fewer_enter_in_proportion(self):
        assert [count_of_share(default_shares(n / 576, 32, 2, 22)[0], 576) for n in (64, 32, 16)] == [172, 86, 43]

    def test_what_is_within_the_target_stays(self):
        assert plan_counts(64, 64, 32, 2, 22) == (64, 64)
        assert plan_counts(63, 64, 32, 2, 22) == (64, 61)

    def test_layers_and_targets_that_do_not_work_are_refused(self):
        with pytest.raises(
            ValueError, match="A mean of 3 visual tokens over 32 layers .* cannot be reached: 172 enter"
        ):
            plan_counts(3, 172, 32, 2, 22)
        for first, second in ((0, 3), (3, 3), (2, 5)):
            with pytest.raises(ValueError, match=f"merge_layer={first} and prune_layer={second} must satisfy"):
                scaled_layers(4, first, second)

    @pytest.mark.parametrize("num_layers", range(2, 12))
    def test_every_depth_from_two_has_its_layers(self, num_layers):
        first, second = scaled_layers(num_layers)
        assert 1 <= first < second <= num_layers


class TestConfiguration:
    @pytest.mark.parametrize("budget", PUBLISHED)
    def test_presets(self, budget):
        path = PRESETS / f"llava_1.5_vitcop_{budget}.json"
        settings = ViTCoPConfig.from_pretrained(path)
        assert (settings.budget, settings.keep_share, settings.center_share) == (budget, *PUBLISHED[budget][:2])
        assert json.loads(path.read_text())["model_type"] == "vitcop"

    @pytest.mark.parametrize(
        "field, value, message",
        [
            ("budget", 0, "vitcop_config.budget must be a positive integer"),
            ("keep_share", 1.5, "vitcop_config.keep_share must be a number in"),
            ("merge_layer", 0, "vitcop_config.merge_layer must be a positive integer"),
            ("keep", 0.5, "vitcop_config has no field 'keep'"),
        ],
    )
    def test_errors_name_the_field(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            ViTCoPConfig(**{field: value})
        with pytest.raises(ValueError, match=message):
            setattr(ViTCoPConfig(), field, value)

    def test_a_share_below_the_budget_is_refused(self):
        with pytest.raises(ValueError, match="keep_share=0.1 keeps 4 of 49 tokens, fewer than the mean of 8"):
            build_vitcop(keep_share=0.1).get_image_features(pixels(1))

    def test_a_tower_without_a_cls_token_is_refused(self):
        model = build_vitcop(vision={"model_type": "siglip_vision_model"})
        with pytest.raises(ValueError, match="ViTCoP, .* need a vision tower with a CLS token, which Siglip"):
            model.get_image_features(pixels(1))


@pytest.fixture(scope="module")
def model():
    return build_vitcop()


@pytest.fixture(scope="module")
def stock(model):
    return stock_twin(model)


ROWS = [prompt([NUM_PATCHES], [7, 8]), prompt([NUM_PATCHES] * 2, [9, 10, 11, 12]), prompt([], [13, 14, 15])]


def alone(model, row, images, **kwargs):
    """The new tokens for one row by itself."""
    images = {"pixel_values": images} if len(images) else {}
    return model.generate(torch.tensor([row]), **images, **{**GREEDY, **kwargs})[0, len(row) :]


class TestModel:
    def test_stage_one_is_that_of_the_loops(self, model):
        output = model.get_image_features(pixels(3))
        for image, features, kept, groups in zip(
            pixels(3), output.pooler_output, output.keep_indices, output.visual_groups
        ):
            expected, places, clusters = naive_features(model, image, KEEP_SHARE, CENTER_SHARE)
            assert kept.tolist() == places
            assert groups[:, 1].tolist() == clusters
            torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("num_images", [1, 2])
    def test_generate_is_the_naive_model_step_by_step(self, model, num_images, use_cache):
        row, images = prompt([NUM_PATCHES] * num_images, [7, 8]), pixels(num_images, seed=5)
        answer = alone(model, row, images, use_cache=use_cache).tolist()
        for step, token in enumerate(answer):
            logits, _ = naive_logits(model, row, images, answer[:step])
            assert int(logits.argmax()) == token

    def test_forward_is_the_naive_model_and_measures_the_layers(self, model):
        row, images = prompt([NUM_PATCHES], [7, 8]), pixels(1)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row]), pixel_values=images)
        logits, seen = naive_logits(model, row, images)
        torch.testing.assert_close(output.logits[0, -1], logits, atol=1e-4, rtol=1e-4)
        assert output.layer_visual_tokens.tolist() == [seen]
        assert output.layer_visual_tokens.float().mean() == pytest.approx(BUDGET, abs=0.5)  # counts are rounded
        assert [cache_of(output).get_seq_length(i) for i in range(NUM_LAYERS)] == [n + 4 for n in seen]
        assert int(output.keep_mask.sum()) == max(seen) + 4 and output.logits.shape[1] == len(row)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows_of_a_batch_are_as_alone(self, model, side):
        with torch.no_grad():
            output = model(**batch(ROWS, side), pixel_values=pixels(3))
            singles = [
                model(input_ids=torch.tensor([row]), **images)
                for row, images in zip(ROWS, ({"pixel_values": pixels(3)[:1]}, {"pixel_values": pixels(3)[1:]}, {}))
            ]
        for index, single in enumerate(singles):
            length = single.logits.shape[1]
            part = output.logits[index, -length:] if side == "left" else output.logits[index, :length]
            torch.testing.assert_close(part, single.logits[0], atol=1e-4, rtol=1e-4)
        assert output.layer_visual_tokens.tolist() == [
            single["layer_visual_tokens"].tolist()[0] if "layer_visual_tokens" in single else [0] * NUM_LAYERS
            for single in singles
        ]

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"num_beams": 3},
            {"num_beams": 2, "num_return_sequences": 2},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prompt_lookup_num_tokens": 3},
        ],
        ids=lambda settings: " ".join(settings) or "greedy",
    )
    def test_generate_of_a_batch_is_that_of_its_rows(self, model, settings):
        rows = ROWS[:1] if "prompt_lookup_num_tokens" in settings else ROWS
        inputs = batch(rows)
        images = pixels(3)[: 1 if len(rows) == 1 else 3]
        got = model.generate(**inputs, pixel_values=images, **{**GREEDY, **settings})
        got = got[:, inputs["input_ids"].shape[1] :]
        copies = settings.get("num_return_sequences", 1)
        plain = {name: value for name, value in settings.items() if name.startswith("num_")}
        expected = []
        for row, part in zip(rows, (images[:1], images[1:], images[:0])):
            part = {"pixel_values": part} if len(part) else {}
            expected.append(model.generate(torch.tensor([row]), **part, **{**GREEDY, **plain})[:, len(row) :])
        assert torch.equal(got, torch.cat(expected))
        assert len(got) == copies * len(rows)

    def test_sampling_repeats_with_its_seed(self, model):
        answers = []
        for _ in range(2):
            torch.manual_seed(7)
            answers.append(alone(model, ROWS[0], pixels(1), do_sample=True, temperature=2.0))
        assert torch.equal(*answers)

    def test_sampled_tokens_follow_the_logits_of_forward(self, model):
        row, images = ROWS[0], pixels(1)
        output = model.generate(
            torch.tensor([row]), pixel_values=images, **GREEDY, return_dict_in_generate=True, output_logits=True
        )
        with torch.no_grad():
            step = model(input_ids=torch.tensor([row]), pixel_values=images)
            for index, token in enumerate(output.sequences[0, len(row) :]):
                torch.testing.assert_close(step.logits[:, -1], output.logits[index], atol=1e-4, rtol=1e-4)
                step = model(input_ids=token[None, None], **{CACHE_NAME: cache_of(step)})

    def test_a_follow_up_on_the_cache_is_the_naive_model(self, model):
        row, images = ROWS[0], pixels(1)
        first = model.generate(torch.tensor([row]), pixel_values=images, **GREEDY, return_dict_in_generate=True)
        chat = torch.cat([first.sequences, torch.tensor([[20, 21]])], dim=1)
        got = model.generate(
            chat, pixel_values=images, **{CACHE_NAME: cache_of(first)}, max_new_tokens=3, do_sample=False
        )
        answer = chat[0, len(row) :].tolist()
        for token in got[0, chat.shape[1] :].tolist():
            logits, _ = naive_logits(model, row, images, answer)
            assert int(logits.argmax()) == token
            answer.append(token)

    def test_short_prompts_give_the_same_answer(self, model):
        short = prompt([len(model.get_image_features(pixels(1)).keep_indices[0])], [7, 8])
        assert torch.equal(alone(model, short, pixels(1)), alone(model, ROWS[0], pixels(1)))

    def test_a_budget_for_the_call(self, model):
        output = model(torch.tensor([ROWS[0]]), pixel_values=pixels(1), num_visual_tokens=12)
        assert output.layer_visual_tokens.float().mean() == pytest.approx(12, abs=0.3)
        output = model(torch.tensor([ROWS[1]]), pixel_values=pixels(2), num_visual_tokens=[12, NUM_PATCHES])
        assert output.layer_visual_tokens.float().mean() - NUM_PATCHES == pytest.approx(12, abs=0.3)

    def test_labels_count_what_follows_the_image(self, model):
        ids = torch.tensor([ROWS[0]])
        output = model(ids, pixel_values=pixels(1), labels=ids.masked_fill(ids == IMAGE, -100))
        kept = ids[output.keep_mask][None]
        logits = output.logits[output.keep_mask]
        losses = torch.nn.functional.cross_entropy(logits[:-1], kept[0, 1:], reduction="none")
        assert torch.allclose(output.loss, losses[kept[0, 1:] != IMAGE].mean())
        output.loss.backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
        model.zero_grad()

    def test_a_split_prompt_is_refused(self, model):
        with pytest.raises(ValueError, match="Set prefill_chunk_size=None"):
            alone(model, ROWS[0], pixels(1), prefill_chunk_size=5)

    @pytest.mark.parametrize("num_layers", [2, 3, 7])
    @pytest.mark.parametrize("image_size", [20, 36])
    def test_any_depth_and_grid(self, num_layers, image_size):
        tokens = (image_size // 4) ** 2
        model = build_vitcop(0.3, num_layers, vision={"image_size": image_size})
        images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        output = model(torch.tensor([prompt([tokens] * 2, [7])]), pixel_values=images)
        counts = output.layer_visual_tokens[0]
        assert len(counts) == num_layers and (counts.diff() <= 0).all() and counts[-1] < counts[0]
        answer = alone(model, prompt([tokens] * 2, [7]), images)
        assert torch.equal(answer, alone(model, prompt([tokens] * 2, [7]), images, use_cache=False))


class TestOff:
    @pytest.mark.parametrize("budget", [None, 1.0, NUM_PATCHES, 1000])
    def test_it_is_the_stock_model_bit_for_bit(self, model, stock, budget):
        inputs = {**batch(ROWS), "pixel_values": pixels(3)}
        model.config.vitcop_config.budget = budget
        try:
            got, expected = model(**inputs), stock(**inputs)
            assert torch.equal(got.logits, expected.logits)
            assert "layer_visual_tokens" not in got
            assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))
        finally:
            model.config.vitcop_config.budget = BUDGET


class TestPruneSIDAndInside:
    """`llm_budget`: PruneSID in front of the language model, norms of keys inside it."""

    def test_the_mean_is_the_target(self):
        model = build_layer_pruned(12, 8, text={"num_hidden_layers": 8})
        output = model(**batch(ROWS), pixel_values=pixels(3))
        mean = output.layer_visual_tokens.float().mean(1)
        assert mean.tolist() == pytest.approx([8, 16, 0], abs=0.5)  # the counts of an image are rounded
        assert output.layer_visual_tokens[0, 0] == 12

    def test_batches_are_as_alone_with_and_without_a_cache(self):
        model = build_layer_pruned(12, 8, text={"num_hidden_layers": 8})
        inputs = batch(ROWS)
        got = model.generate(**inputs, pixel_values=pixels(3), **GREEDY)[:, inputs["input_ids"].shape[1] :]
        for row, answer, part in zip(ROWS, got, (pixels(3)[:1], pixels(3)[1:], pixels(3)[:0])):
            assert torch.equal(alone(model, row, part), answer)
            assert torch.equal(alone(model, row, part, use_cache=False), answer)

    def test_without_a_budget_in_front_all_tokens_enter(self):
        model = build_layer_pruned(None, 20, text={"num_hidden_layers": 8})
        output = model(torch.tensor([ROWS[0]]), pixel_values=pixels(1))
        assert output.layer_visual_tokens[0, 0] == NUM_PATCHES
        assert output.layer_visual_tokens.float().mean() == pytest.approx(20, abs=0.3)

    def test_a_target_that_all_meet_drops_nothing_more(self):
        plain, both = build(8, seed=1), build_layer_pruned(8, 8, seed=1)
        inputs = {**batch(ROWS), "pixel_values": pixels(3)}
        torch.testing.assert_close(both(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=1e-5)

    def test_other_families_refuse_it(self):
        assert LayerPrunedLlavaConfig(prunesid_config={"llm_budget": 8}).prunesid_config.llm_budget == 8
        for config_class in (PruneSIDLlavaConfig, PruneSIDLlavaNextConfig):
            with pytest.raises(ValueError, match="llm_budget must be None for this model.*LayerPrunedLlavaFor"):
                config_class(prunesid_config={"llm_budget": 8})
            assert config_class(prunesid_config={"llm_budget": None}).prunesid_config.budget == 64


def test_a_second_image_on_a_cache_is_thinned_out_too(model):
    cache, first, second = DynamicCache(), ROWS[0], [6, *[IMAGE] * NUM_PATCHES, 20]
    with torch.no_grad():
        one = model(torch.tensor([first]), pixel_values=pixels(2)[:1], **{CACHE_NAME: cache})
        two = model(torch.tensor([second]), pixel_values=pixels(2)[1:], **{CACHE_NAME: cache})
    assert torch.equal(one.layer_visual_tokens, two.layer_visual_tokens)
    seen = one.layer_visual_tokens[0]
    lengths = [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)]
    assert lengths == [2 * int(count) + 4 + 2 for count in seen]
    logits, _ = naive_logits(model, [*first, *second], pixels(2))
    torch.testing.assert_close(two.logits[0, -1], logits, atol=1e-3, rtol=1e-3)
