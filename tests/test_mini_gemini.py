"""Mini-Gemini: its patch-info mining against plain loops, PruneSID on its tokens, its processor, and the Hub."""

import json
from pathlib import Path

import pytest
import torch
from clean_process import LOAD, run_clean
from tiny import BUDGET, IMAGE, NUM_PATCHES, VISION, batch, prompt
from tiny_checkpoint import CHAT_TEMPLATE, build_processor, picture
from tiny_mini_gemini import HD, HIGH, HIGH_RES, LOW, PATCH, build, build_config, pixels, stock_twin
from tiny_processor import check_what_is_set_is_obeyed
from torch.nn.functional import avg_pool2d
from transformers import LlavaImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
    MiniGeminiProcessor,
    PruneSIDConfig,
    PruneSIDMiniGeminiForConditionalGeneration,
    PruneSIDMiniGeminiModel,
    PruneSIDMiniGeminiProcessor,
)
from modeling_prunesid.context import SELECTIONS
from modeling_prunesid.dynamic import information_budgets, redundancy
from modeling_prunesid.modeling_mini_gemini import MiniGeminiPatchInfoMining
from modeling_prunesid.select_tokens import select_tokens
from modeling_prunesid.upstream import CACHE_NAME, cache_of
from prunesid_cli import calibrate
from prunesid_cli.command import main


GREEDY = {"max_new_tokens": 5, "do_sample": False}


def projected(sequential, vector):
    """LayerNorm and linear map of one vector, written out."""
    norm, linear = sequential
    normal = (vector - vector.mean()) / torch.sqrt(vector.var(correction=0) + norm.eps)
    return linear.weight @ (normal * norm.weight + norm.bias) + linear.bias


@torch.no_grad()
def mined_by_loops(mining, tokens, feature_map):
    """Patch-info mining of one view: `tokens` (side ** 2, dim), `feature_map` (high_dim, height, width)."""
    side = round(len(tokens) ** 0.5)
    window = feature_map.shape[-1] // side
    found = []
    for row in range(side):
        for column in range(side):
            query = projected(mining.query_projector, tokens[row * side + column])
            places = [
                feature_map[:, row * window + down, column * window + right]
                for down in range(window)
                for right in range(window)
            ]
            logits = torch.stack([query @ projected(mining.key_projector, place) for place in places])
            weights = torch.exp(logits / len(query) ** 0.5)
            values = [projected(mining.value_projector, place) for place in places]
            found.append(sum(weight * value for weight, value in zip(weights / weights.sum(), values, strict=True)))
    return torch.stack(found)


def enlarged(feature_map, size):
    """Bilinear interpolation of (dim, height, width) to (dim, size, size), pixel centres at halves."""
    last = feature_map.shape[-1] - 1
    result = torch.empty(len(feature_map), size, size, dtype=feature_map.dtype)
    for row in range(size):
        for column in range(size):
            y, x = ((place + 0.5) * (last + 1) / size - 0.5 for place in (row, column))
            y, x = max(y, 0), max(x, 0)
            up, left = int(y), int(x)
            down, right = min(up + 1, last), min(left + 1, last)
            upper = feature_map[:, up, left] * (1 - x + left) + feature_map[:, up, right] * (x - left)
            lower = feature_map[:, down, left] * (1 - x + left) + feature_map[:, down, right] * (x - left)
            result[:, row, column] = upper * (1 - y + up) + lower * (y - up)
    return result


@torch.no_grad()
def map_by_stages(model, image):
    """All stages of the ConvNeXt, one module after the other, in the resolution of the first."""
    tower = model.model.high_res_vision_tower
    hidden, stages = tower.embeddings(image[None].to(tower.dtype)), []
    for stage in tower.encoder.stages:
        hidden = stage(hidden)
        stages.append(hidden[0])
    size = stages[0].shape[-1]
    return torch.cat([stage if stage.shape[-1] == size else enlarged(stage, size) for stage in stages])


@torch.no_grad()
def low_res_tokens(model, view):
    return model.model.vision_tower(view[None], output_hidden_states=True).hidden_states[-2][0, 1:]


@torch.no_grad()
def oracle_generate(stock, rows, images, budget, **kwargs):
    """The new tokens of the model without PruneSID, on short prompts and features of the kept tokens."""
    _, tokens = stock.model.get_image_tokens(**images)
    kept = select_tokens(tokens, budget).indices
    features = [stock.model.multi_modal_projector(image[rows]) for image, rows in zip(tokens, kept, strict=True)]
    inputs = batch(rows)
    output = stock.generate(
        **inputs, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)}, **kwargs
    )
    return output[:, inputs["input_ids"].shape[1] :]


def new_tokens(model, rows, images, **kwargs):
    inputs = batch(rows)
    return model.generate(**inputs, **images, **GREEDY, **kwargs)[:, inputs["input_ids"].shape[1] :]


class TestPatchInfoMining:
    @pytest.mark.parametrize("side, window", [(1, 1), (2, 3), (3, 2), (5, 1), (2, 8)])
    def test_every_token_attends_to_its_own_window(self, side, window):
        torch.manual_seed(side * 10 + window)
        mining = MiniGeminiPatchInfoMining(build_config()).double()
        with torch.no_grad():
            for parameter in mining.parameters():
                parameter.normal_()
        tokens = torch.randn(2, side**2, VISION["hidden_size"], dtype=torch.float64)
        maps = torch.randn(2, sum(HIGH_RES["hidden_sizes"]), side * window, side * window, dtype=torch.float64)
        expected = torch.stack([mined_by_loops(mining, *view) for view in zip(tokens, maps, strict=True)])
        torch.testing.assert_close(mining(tokens, maps), expected)

    def test_overflow_in_a_window_stays_in_it(self):
        mining = MiniGeminiPatchInfoMining(build_config())
        tokens = torch.randn(1, 4, VISION["hidden_size"])
        maps = torch.randn(1, sum(HIGH_RES["hidden_sizes"]), 4, 4)
        with torch.no_grad():
            mining.query_projector[1].weight.mul_(1e30)
            mining.key_projector[1].weight.mul_(1e30)
        assert mining(tokens, maps).isfinite().all()


class TestFinalTokens:
    def test_one_view(self):
        model, images = build(), pixels(2)
        _, tokens = model.model.get_image_tokens(**images)
        for image in range(2):
            low = low_res_tokens(model, images["pixel_values"][image])
            feature_map = map_by_stages(model, images["high_res_pixel_values"][image])
            expected = low + mined_by_loops(model.model.patch_info_mining, low, feature_map)
            torch.testing.assert_close(tokens[image], expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("has_global", [False, True])
    def test_tiles_and_the_whole(self, has_global):
        model = build(views={"image_grid": 2, "image_global": has_global})
        images = pixels(2, grid=2, has_global=has_global)
        _, tokens = model.model.get_image_tokens(**images)
        assert tokens.shape[1] == model.config.num_image_tokens == (5 if has_global else 4) * NUM_PATCHES
        for image in range(2):
            whole = map_by_stages(model, images["high_res_pixel_values"][image])
            half = whole.shape[-1] // 2
            maps = [whole[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
            low = [low_res_tokens(model, view) for view in images["pixel_values"][image]]
            order = range(4)
            if has_global:
                maps.append(avg_pool2d(whole, 2))
                order = [4, 0, 1, 2, 3]
            mining = model.model.patch_info_mining
            expected = torch.cat([low[view] + mined_by_loops(mining, low[view], maps[view]) for view in order])
            torch.testing.assert_close(tokens[image], expected, rtol=1e-4, atol=1e-4)

    def test_gradients_reach_all_parts(self):
        model = build()
        model(input_ids=torch.tensor([prompt([NUM_PATCHES], [7, 8])]), **pixels(1)).logits.sum().backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        # What CLIP computes behind the layer that is read.
        assert all("vision_tower.encoder.layers.3." in name or "post_layernorm" in name for name in without), without


class TestOff:
    @pytest.mark.parametrize("budget, views", [(None, None), (None, HD), (1.0, None), (10_000, HD)])
    def test_is_the_model_without_prunesid_bit_for_bit(self, budget, views):
        model = build(budget, views)
        stock, length = stock_twin(model), model.config.num_image_tokens
        images = pixels(2, grid=2, has_global=True) if views else pixels(2)
        inputs = {**batch([prompt([length], [7, 8]), prompt([length], [9])]), **images}
        labels = inputs["input_ids"].clone()
        ours, expected = model(**inputs, labels=labels), stock(**inputs, labels=labels)
        assert torch.equal(ours.logits, expected.logits)
        assert torch.equal(ours.loss, expected.loss)
        assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))

    def test_the_same_object_switches(self):
        model = build()
        stock = stock_twin(model)
        inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7])]), **pixels(1)}
        shortened = model(**inputs).logits
        model.config.prunesid_config.budget = None
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        model.config.prunesid_config.budget = BUDGET
        assert torch.equal(model(**inputs).logits, shortened)


class TestKeptTokens:
    @pytest.mark.parametrize("views", [None, HD], ids=["one view", "HD"])
    def test_are_chosen_among_the_final_tokens(self, views):
        model = build(views=views)
        images = pixels(3, grid=2, has_global=True) if views else pixels(3)
        output = model.get_image_features(**images)
        _, tokens = stock_twin(model).model.get_image_tokens(**images)
        expected = select_tokens(tokens, BUDGET).indices
        assert torch.equal(torch.stack(output.keep_indices), expected)
        assert output.num_placeholders == [model.config.num_image_tokens] * 3
        for image in range(3):
            features = model.model.multi_modal_projector(tokens[image][expected[image]])
            torch.testing.assert_close(output.pooler_output[image], features)

    def test_spread_measures_distances_of_projected_tokens(self):
        model, images = build(quota="spread"), pixels(2)
        _, tokens = stock_twin(model).model.get_image_tokens(**images)
        projected = model.model.multi_modal_projector(tokens).detach()
        expected = select_tokens(tokens, BUDGET, quota="spread", projected=projected).indices
        assert torch.equal(torch.stack(model.get_image_features(**images).keep_indices), expected)

    def test_each_image_may_have_its_own_budget(self):
        output = build().get_image_features(**pixels(3), num_visual_tokens=[4, 49, 9])
        assert [len(rows) for rows in output.keep_indices] == [4, 49, 9]

    def test_a_dynamic_budget_follows_the_information(self):
        model = build(budget=16, dynamic=True, reference_information=0.9)
        images = pixels(3)
        images["pixel_values"][1] = images["high_res_pixel_values"][1] = 0
        _, tokens = model.model.get_image_tokens(**images)
        expected = information_budgets(redundancy(tokens), 16, NUM_PATCHES, 0.9).tolist()
        assert len(set(expected)) > 1
        assert [len(rows) for rows in model.get_image_features(**images).keep_indices] == expected
        rows = [prompt([NUM_PATCHES], [7]), prompt([NUM_PATCHES], [8]), prompt([NUM_PATCHES], [9])]
        assert new_tokens(model, rows, images).shape == (3, 5)


class TestPrompts:
    @pytest.mark.parametrize("views", [None, HD], ids=["one view", "HD"])
    def test_full_and_short_ones_get_the_answer_of_the_stock_parts(self, views):
        model = build(views=views)
        images = pixels(1, grid=2, has_global=True) if views else pixels(1)
        full, short = prompt([model.config.num_image_tokens], [7, 8]), prompt([BUDGET], [7, 8])
        expected = oracle_generate(stock_twin(model), [short], images, BUDGET, **GREEDY)
        assert torch.equal(new_tokens(model, [full], images), expected)
        assert torch.equal(new_tokens(model, [short], images), expected)
        output = model(input_ids=torch.tensor([full]), **images)
        assert output.logits.shape[1] == len(full)
        assert torch.equal(output.logits[output.keep_mask], model(input_ids=torch.tensor([short]), **images).logits[0])

    def test_a_padded_batch_answers_as_its_rows_alone(self):
        model, images = build(), pixels(3)
        rows = [prompt([NUM_PATCHES], [7, 8, 9]), prompt([NUM_PATCHES], [7]), prompt([NUM_PATCHES], [11, 12])]
        together = new_tokens(model, rows, images)
        for index, row in enumerate(rows):
            alone = {name: value[index : index + 1] for name, value in images.items()}
            assert torch.equal(together[index : index + 1], new_tokens(model, [row], alone))

    def test_several_images_in_a_prompt(self):
        model, images = build(), pixels(3)
        rows = [prompt([NUM_PATCHES] * 2, [7, 8]), prompt([NUM_PATCHES], [9])]
        short = [prompt([BUDGET] * 2, [7, 8]), prompt([BUDGET], [9])]
        expected = oracle_generate(stock_twin(model), short, images, BUDGET, **GREEDY)
        assert torch.equal(new_tokens(model, rows, images), expected)
        assert torch.equal(new_tokens(model, short, images), expected)

    def test_a_second_turn_with_the_cache_is_the_answer_without_it(self):
        model, images = build(), pixels(1)
        first = model.generate(
            input_ids=torch.tensor([prompt([NUM_PATCHES], [7])]), **images, **GREEDY, return_dict_in_generate=True
        )
        chat = torch.cat([first.sequences, torch.tensor([[8, 9]])], dim=1)
        again = model.generate(input_ids=chat, **images, **GREEDY, **{CACHE_NAME: cache_of(first)})
        assert torch.equal(again, model.generate(input_ids=chat, **images, **GREEDY))

    def test_labels_are_shortened_with_the_prompt(self):
        model, images = build(), pixels(1)
        ids = torch.tensor([prompt([NUM_PATCHES], [7, 8, 9])])
        output = model(input_ids=ids, labels=ids, **images)
        labels = ids.masked_fill(ids == IMAGE, -100)[output.keep_mask]
        expected = torch.nn.functional.cross_entropy(output.logits[output.keep_mask][:-1], labels[1:])
        torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)

    def test_sampling_and_beams_run_on_several_sequences(self):
        model, images = build(), pixels(1)
        ids = torch.tensor([prompt([NUM_PATCHES], [7])])
        output = model.generate(input_ids=ids, **images, num_beams=3, num_return_sequences=2, **GREEDY)
        assert output.shape == (2, ids.shape[1] + 5)


class TestErrors:
    def test_a_missing_resolution(self):
        images = pixels(1)
        del images["high_res_pixel_values"]
        with pytest.raises(ValueError, match="high_res_pixel_values is missing"):
            build()(input_ids=torch.tensor([prompt([NUM_PATCHES], [7])]), **images)

    def test_other_numbers_of_images_in_the_two_resolutions(self):
        images = {**pixels(2), "high_res_pixel_values": pixels(1)["high_res_pixel_values"]}
        with pytest.raises(ValueError, match=r"pixel_values must have the shape \(1,\)"):
            build().get_image_features(**images)

    def test_tiles_of_another_grid(self):
        with pytest.raises(ValueError, match=r"pixel_values must have the shape \(1, 5\)"):
            build(views=HD).get_image_features(**pixels(1, grid=2))

    @pytest.mark.parametrize("shape", [(57, 57), (56, 84), (60, 60)])
    def test_a_high_resolution_without_whole_windows(self, shape):
        images = {**pixels(1), "high_res_pixel_values": torch.randn(1, 3, *shape)}
        with pytest.raises(ValueError, match="multiple of 28 pixels"):
            build().get_image_features(**images)

    def test_placeholders_that_fit_no_image(self):
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            build()(input_ids=torch.tensor([prompt([NUM_PATCHES - 1], [7])]), **pixels(1))

    def test_a_forgotten_image(self):
        with pytest.raises(ValueError, match="pass pixel_values"):
            build().generate(input_ids=torch.tensor([prompt([NUM_PATCHES], [7])]), **GREEDY)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({}, "method='release' needs cls_attention of a vision tower with a CLS token"),
            ({"score": "component"}, "has keep_cls=True"),
        ],
    )
    def test_settings_that_need_a_cls_token(self, settings, message):
        model = build()
        model.config.prunesid_config.method = "release"
        model.config.prunesid_config.method_settings = settings
        with pytest.raises(ValueError, match=f"{message}.* no CLS token"):
            model.get_image_features(**pixels(1))

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"image_grid": 0}, "image_grid must be a positive integer, got 0"),
            ({"image_global": True}, "image_global=True"),
            ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy must be 'default'"),
            ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer must be a single layer"),
        ],
    )
    def test_configurations(self, fields, message):
        with pytest.raises(ValueError, match=message):
            MiniGeminiConfig(**fields)

    def test_a_strategy_of_a_call(self):
        with pytest.raises(ValueError, match="vision_feature_select_strategy must be 'default'"):
            build().get_image_features(**pixels(1), vision_feature_select_strategy="full")


def build_stock_processor(**views):
    side = {"height": views.get("image_grid", 1) * HIGH, "width": views.get("image_grid", 1) * HIGH}
    return MiniGeminiProcessor(
        LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side["height"]}, crop_size=side),
        build_processor().tokenizer,
        patch_size=PATCH,
        chat_template=CHAT_TEMPLATE,
        low_res_size=LOW,
        **views,
    )


def build_short_processor(**views):
    stock = build_stock_processor(**views)
    return PruneSIDMiniGeminiProcessor(
        stock.image_processor,
        stock.tokenizer,
        patch_size=PATCH,
        chat_template=CHAT_TEMPLATE,
        low_res_size=LOW,
        num_visual_tokens=BUDGET,
        **views,
    )


class TestProcessor:
    def test_the_low_resolution_is_the_high_one_reduced(self):
        processor = build_stock_processor()
        inputs = processor(images=[picture(0), picture(1)], text="<image> word7 <image> word8", return_tensors="pt")
        expected = processor.image_processor([picture(0), picture(1)], return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["high_res_pixel_values"], expected)
        torch.testing.assert_close(inputs["pixel_values"], avg_pool2d(expected, 2), rtol=1e-5, atol=1e-5)
        assert int((inputs["input_ids"] == IMAGE).sum()) == 2 * NUM_PATCHES

    def test_a_wide_picture_is_padded_to_a_square(self):
        inputs = build_stock_processor()(images=picture().resize((40, 20)), text="<image>", return_tensors="pt")
        edge, middle = inputs["high_res_pixel_values"][0, :, 0], inputs["high_res_pixel_values"][0, :, HIGH // 2]
        assert edge.abs().max() < 0.02  # the mean colour
        assert middle.abs().max() > 0.5

    def test_tiles_come_row_by_row_and_the_whole_last(self):
        inputs = build_stock_processor(**HD)(images=picture(), text="<image> word7", return_tensors="pt")
        reduced = avg_pool2d(inputs["high_res_pixel_values"], 2)[0]
        tiles = [reduced[:, y : y + LOW, x : x + LOW] for y in (0, LOW) for x in (0, LOW)]
        assert inputs["high_res_pixel_values"].shape == (1, 3, 2 * HIGH, 2 * HIGH)
        torch.testing.assert_close(inputs["pixel_values"][0, :4], torch.stack(tiles), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs["pixel_values"][0, 4], avg_pool2d(reduced, 2), rtol=1e-5, atol=1e-5)
        assert int((inputs["input_ids"] == IMAGE).sum()) == 5 * NUM_PATCHES

    @pytest.mark.parametrize("views", [{}, HD], ids=["one view", "HD"])
    def test_short_prompts(self, views):
        processor, model = build_short_processor(**views), build(views=views)
        ask = {"images": picture(), "text": "<image> word7", "return_tensors": "pt"}
        short, full = processor(**ask), build_stock_processor(**views)(**ask)
        assert int((short["input_ids"] == IMAGE).sum()) == BUDGET
        assert short["num_visual_tokens"].tolist() == [BUDGET]
        answers = [
            model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
            for inputs in (short, full, processor(**ask, num_visual_tokens=12))
        ]
        assert torch.equal(answers[0], answers[1])
        assert answers[2].shape == answers[0].shape

    def test_what_is_set_later_is_obeyed(self, tmp_path):
        check_what_is_set_is_obeyed(
            build_short_processor(),
            tmp_path,
            lambda processor: processor(images=picture(), text="<image> word7", return_tensors="pt"),
        )

    @pytest.mark.parametrize("views", [{}, HD], ids=["one view", "HD"])
    def test_counts_for_engines_that_size_prompts_up_front(self, views):
        sizes = [(10, 20), (30, 30)]
        total = (5 if views else 1) * NUM_PATCHES
        assert build_stock_processor(**views)._get_num_multimodal_tokens(sizes).num_image_tokens == [total] * 2
        assert build_short_processor(**views)._get_num_multimodal_tokens(sizes).num_image_tokens == [BUDGET] * 2

    def test_both_resolutions_are_inputs_of_the_model(self):
        assert {"pixel_values", "high_res_pixel_values"} <= set(build_stock_processor().model_input_names)
        assert "num_visual_tokens" in build_short_processor().model_input_names

    def test_saved_settings_are_loaded(self, tmp_path):
        build_stock_processor(**HD).save_pretrained(tmp_path)
        loaded = MiniGeminiProcessor.from_pretrained(tmp_path)
        assert (loaded.low_res_size, loaded.patch_size, loaded.image_grid, loaded.image_global) == (
            LOW,
            PATCH,
            2,
            True,
        )

    @pytest.mark.parametrize("fields", [{"image_grid": 0}, {"image_grid": 1, "image_global": True}])
    def test_grids_that_are_none(self, fields):
        with pytest.raises(ValueError, match=next(reversed(fields))):
            build_stock_processor(**fields)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of the model without PruneSID."""
    folder = tmp_path_factory.mktemp("base")
    stock_twin(build()).save_pretrained(folder)
    build_stock_processor().save_pretrained(folder)
    return folder


def load(folder, model_class=PruneSIDMiniGeminiForConditionalGeneration, **kwargs):
    """A model of which every weight was loaded, and whose checkpoint has no other."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.fixture(scope="module")
def variant(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variant")
    load(base, prunesid_config=PruneSIDConfig(budget=BUDGET)).save_pretrained(folder)
    return folder


class TestFolders:
    def test_calibrate_judges_the_lambda_that_the_model_uses(self, base, tmp_path, monkeypatch):
        """N/32, though there is no tower in which its tokens are compared."""
        survival, asked = calibrate.survival, []

        def watched(view, budget, of_share):
            asked.append(of_share)
            return survival(view, budget, of_share)

        monkeypatch.setattr(calibrate, "survival", watched)
        (tmp_path / "pictures").mkdir()
        for seed in range(2):
            picture(seed).save(tmp_path / "pictures" / f"{seed}.png")
        main(
            ["calibrate", str(base), str(tmp_path / "pictures"), "--budget", "5", "--output", str(tmp_path / "x.json")]
        )
        with torch.no_grad():
            token = SELECTIONS.set(used := [])
            load(base, prunesid_config={"budget": 5}).get_image_features(**pixels(1))
            SELECTIONS.reset(token)
        assert set(asked) == {context.lambda_of_share for _, _, context, *_ in used} == {False}

    def test_a_base_loads_with_every_weight_and_off_answers_as_itself(self, base):
        model, stock = load(base, prunesid_config={"budget": None}), load(base, MiniGeminiForConditionalGeneration)
        inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7])]), **pixels(1)}
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        assert PruneSIDMiniGeminiModel.from_pretrained(base).state_dict().keys() == stock.model.state_dict().keys()

    def test_saved_weights_are_the_bases_byte_for_byte(self, base, variant):
        assert Path(variant, "model.safetensors").read_bytes() == Path(base, "model.safetensors").read_bytes()

    def test_the_configuration_names_our_classes_and_every_module_is_there(self, variant):
        config = json.loads(Path(variant, "config.json").read_text())
        assert config["model_type"] == "prunesid_mini_gemini"
        assert config["architectures"] == ["PruneSIDMiniGeminiForConditionalGeneration"]
        assert config["auto_map"] == {
            "AutoConfig": "modeling_prunesid_mini_gemini.PruneSIDMiniGeminiConfig",
            "AutoModel": "modeling_prunesid_mini_gemini.PruneSIDMiniGeminiAutoModel",
            "AutoModelForImageTextToText": (
                "modeling_prunesid_mini_gemini.PruneSIDMiniGeminiForConditionalGeneration"
            ),
            "AutoModelForMultimodalLM": "modeling_prunesid_mini_gemini.PruneSIDMiniGeminiForConditionalGeneration",
            "AutoProcessor": "modeling_prunesid_mini_gemini.PruneSIDMiniGeminiProcessor",
        }
        modules = {path.stem for path in Path(variant).glob("*.py")}
        assert {"modeling_mini_gemini", "configuration_mini_gemini", "processing_mini_gemini"} <= modules
        for path in Path(variant).glob("*.py"):
            for line in path.read_text().splitlines():
                if line.strip().startswith("from ."):
                    assert line.split()[1].removeprefix(".") in modules, f"{path.name}: {line}"

    def test_a_thin_variant_takes_weights_and_processor_from_its_base(self, base, tmp_path):
        load(base, prunesid_config={"budget": 5}).save_pretrained(tmp_path, thin=True)
        assert not list(tmp_path.glob("*.safetensors"))
        model = load(tmp_path)
        inputs = PruneSIDMiniGeminiProcessor.from_pretrained(tmp_path)(
            images=picture(), text="<image> word7", return_tensors="pt"
        )
        assert int((inputs["input_ids"] == IMAGE).sum()) == 5
        expected = load(base, prunesid_config={"budget": 5}).generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)

    @pytest.mark.contract
    def test_a_clean_process_loads_it_by_every_auto_class(self, variant, tmp_path):
        found = run_clean(LOAD, tmp_path, variant)
        assert found["config"] == "PruneSIDMiniGeminiConfig"
        assert found["processor"] == "PruneSIDMiniGeminiProcessor"
        assert found["length"] == BUDGET + 2
        for auto_class in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
            assert found[auto_class]["class"] == "PruneSIDMiniGeminiForConditionalGeneration"
            assert found[auto_class]["keys"] == []
            assert found[auto_class]["answer"] == found["AutoModel"]["answer"]
            assert len(found[auto_class]["answer"][0]) == found["length"] + 6
        assert found["AutoModel"]["from_config"] == "PruneSIDMiniGeminiModel"
        assert found["one chat"].split()
        assert found["two chats"] == [found["one chat"]] * 2


def test_attention_of_a_tower_that_tokens_are_not_compared_in_is_refused_before_it_runs():
    model = build(method="spread", method_settings={"score": "attention", "keep_cls": False})
    model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower runs"))
    inputs = {**batch([prompt([NUM_PATCHES], [5])]), **pixels(1)}
    for call in (lambda: model.get_image_features(**pixels(1)), lambda: model.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(ValueError, match="score='attention' is not declared for PruneSIDMiniGemini"):
            call()
