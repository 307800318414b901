"""
LLaVA-NeXT. The oracle is the stock class: its packed features of whole images say what belongs at each placeholder,
and its `generate`, on short prompts and the kept ones of these features, says what must be answered.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clean_process import run_clean
from PIL import Image
from tiny import BOS, EOS, IMAGE, PAD, batch, prompt, stock_twin
from tiny_llava_next import (
    BUDGET,
    CROP,
    GRIDS,
    PATCH,
    ROWS,
    SIDE,
    SIZES,
    build,
    crops_of,
    full_batch,
    full_count,
    images,
    new_tokens,
    packed,
    rows,
)
from tiny_processor import check_what_is_set_is_obeyed
from tiny_words import word_tokenizer
from transformers import LlavaNextConfig, LlavaNextImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from modeling_prunesid import (
    PruneSIDConfig,
    PruneSIDLlavaNextProcessor,
)
from modeling_prunesid.budgets import share_total
from modeling_prunesid.dynamic import redundancy
from modeling_prunesid.select_tokens import select_tokens
from modeling_prunesid.tower_crops import NEWLINE, views_of_crops


PATCHES = SIDE * SIDE


@pytest.fixture
def ours():
    return build()


def short_count(size, budget=BUDGET):
    return sum(min(budget, len(crop)) for crop in crops_of(size))


@torch.no_grad()
def oracle_features(stock, inputs, keep_indices):
    whole = stock.model.get_image_features(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    features = [image[kept] for image, kept in zip(whole.pooler_output, keep_indices)]
    return BaseModelOutputWithPooling(pooler_output=features)


@torch.no_grad()
def tower_patches(stock, inputs):
    """What selection compares: for each image and crop, `(49, 32)` patch features."""
    crops = [
        stock.model.vision_tower(pixels[: len(crops_of(size))], output_hidden_states=True).hidden_states[-2][:, 1:]
        for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist())
    ]
    return crops


class TestPacking:
    @pytest.mark.parametrize("size", [*SIZES, (1000, 37), (33, 1000), (61, 59), (7, 300), (500, 400)], ids=str)
    def test_placeholders_stand_in_upstreams_order(self, stock, size):
        crops = len(crops_of(size))
        numbers = torch.arange(crops * PATCHES).view(1, crops, PATCHES, 1)
        expected, _ = stock.model.pack_image_features(
            numbers, torch.tensor([size]), "default", image_newline=torch.tensor([NEWLINE])
        )
        assert torch.equal(packed(size), expected[0][:, 0])

    def test_kept_tokens_are_in_the_raster_order_of_the_whole_image(self, ours):
        for kept, size in zip(ours.get_image_features(**images()).keep_indices, SIZES):
            tokens = packed(size)[kept]
            base, grid = tokens[tokens < PATCHES], tokens[tokens >= PATCHES] - PATCHES
            assert torch.equal(tokens[: len(base)], base)
            assert torch.equal(base, base.sort().values)
            _, columns = get_anyres_image_grid_shape(size, GRIDS, CROP)
            crop, patch = grid // PATCHES, grid % PATCHES
            line = crop // columns * SIDE + patch // SIDE
            column = crop % columns * SIDE + patch % SIDE
            raster = line * columns * SIDE + column
            assert torch.equal(raster, raster.sort().values)

    def test_every_crop_keeps_its_budget_of_what_is_no_padding(self, ours):
        for kept, size in zip(ours.get_image_features(**images()).keep_indices, SIZES):
            crop = packed(size)[kept] // PATCHES
            counts = torch.bincount(crop, minlength=len(crops_of(size))).tolist()
            assert counts == [min(BUDGET, len(shown)) for shown in crops_of(size)]

    def test_padding_takes_no_part_in_the_choice(self, ours, stock):
        inputs = images()
        output = ours.get_image_features(**inputs)
        for kept, size, crops in zip(output.keep_indices, SIZES, tower_patches(stock, inputs)):
            expected = [
                crop * PATCHES + shown[select_tokens(states[shown][None], BUDGET).indices[0]]
                for crop, (shown, states) in enumerate(zip(crops_of(size), crops))
            ]
            assert torch.equal(packed(size)[kept].sort().values, torch.cat(expected).sort().values)

    def test_spread_measures_distances_of_projected_tokens(self, ours, stock, monkeypatch):
        inputs, settings = images(), ours.config.prunesid_config
        monkeypatch.setattr(settings, "method", "spread")
        monkeypatch.setattr(settings, "method_settings", {"score": "component"})
        output = ours.get_image_features(**inputs)
        for kept, size, crops in zip(output.keep_indices, SIZES, tower_patches(stock, inputs)):
            expected = []
            for crop, (shown, states) in enumerate(zip(crops_of(size), crops)):
                projected = stock.model.multi_modal_projector(states)[shown]
                chosen = select_tokens(states[shown][None], BUDGET, quota="spread", projected=projected[None]).indices
                expected.append(crop * PATCHES + shown[chosen[0]])
            assert torch.equal(packed(size)[kept].sort().values, torch.cat(expected).sort().values)

    def test_newline_tokens_leave_with_the_first_dropped_patch(self, ours, stock):
        inputs = images()
        visible = [sum(map(len, crops_of(size))) for size in SIZES]
        totals = [visible[0], visible[1] - 1, 20, visible[3], 20]
        output = ours.get_image_features(**inputs, num_visual_tokens=totals)
        whole = stock.model.get_image_features(**inputs).pooler_output
        for index, (features, kept, size) in enumerate(zip(output.pooler_output, output.keep_indices, SIZES)):
            newlines = int((packed(size)[kept] == NEWLINE).sum())
            if totals[index] == visible[index]:
                assert newlines == full_count(size) - visible[index] > 0
                torch.testing.assert_close(features, whole[index])
            else:
                assert newlines == 0
                assert len(kept) == totals[index]

    def test_crops_that_fill_up_a_batch_are_not_encoded(self, ours):
        inputs = images()
        expected = ours.get_image_features(**inputs)
        joined = torch.cat([pixels[: len(crops_of(size))] for pixels, size in zip(inputs["pixel_values"], SIZES)])
        inputs["pixel_values"][1, 4] = float("nan")  # the second image has four crops
        for pixel_values in (inputs["pixel_values"], joined):
            output = ours.get_image_features(pixel_values=pixel_values, image_sizes=inputs["image_sizes"])
            for features, kept, other, other_kept in zip(
                output.pooler_output, output.keep_indices, expected.pooler_output, expected.keep_indices
            ):
                assert torch.equal(kept, other_kept)
                assert torch.equal(features, other)

    def test_cls_tokens_count_and_come_before_their_patches(self, stock):
        # In float64, because the projector rounds a row differently beside other rows on some processors.
        ours = build(keep_cls=True, score="cls_attention", center="features", quota="bounded").double()
        inputs = images()
        inputs["pixel_values"] = inputs["pixel_values"].double()
        output = ours.get_image_features(**inputs)
        for features, kept, size, pixels in zip(
            output.pooler_output, output.keep_indices, SIZES, inputs["pixel_values"]
        ):
            crops = len(crops_of(size))
            assert len(kept) == short_count(size)
            first_of_grid = int((packed(size)[kept[kept >= 0]] < PATCHES).sum()) + 1
            assert kept[0] == -1
            assert kept[first_of_grid : first_of_grid + crops - 1].tolist() == [-1] * (crops - 1)
            with torch.no_grad():
                tower = ours.model.vision_tower(pixels[:crops], output_hidden_states=True).hidden_states[-2]
                cls = ours.model.multi_modal_projector(tower[:, 0])
            torch.testing.assert_close(features[kept == -1], cls)


class TestTotals:
    @pytest.mark.parametrize("dynamic", [False, True], ids=["equal", "dynamic"])
    @pytest.mark.parametrize("budget", [30, 0.25], ids=["count", "share"])
    def test_the_total_of_an_image_is_exact(self, budget, dynamic):
        ours = build(budget, budget_scope="image", dynamic=dynamic)
        for kept, size in zip(ours.get_image_features(**images()).keep_indices, SIZES):
            visible = sum(map(len, crops_of(size)))
            assert len(kept) == (budget if isinstance(budget, int) else int(budget * visible + 0.5))

    def test_an_equal_total_is_the_budget_of_each_crop(self):
        crops = [len(crops_of(size)) for size in SIZES]
        totals = [BUDGET * count for count in crops]
        by_crop = build().get_image_features(**images()).keep_indices
        by_image = build(budget_scope="image").get_image_features(**images(), num_visual_tokens=totals).keep_indices
        for one, other in zip(by_crop, by_image):
            assert torch.equal(one, other)

    def test_a_dynamic_total_goes_to_the_crops_with_information(self, stock):
        ours = build(40, budget_scope="image", dynamic=True)
        inputs = images([(56, 56)])
        inputs["pixel_values"][0, 2] = 0.1  # a crop that shows nothing
        (kept,) = ours.get_image_features(**inputs).keep_indices
        counts = torch.bincount(packed((56, 56))[kept] // PATCHES, minlength=5).tolist()
        rho = [float(redundancy(crop[None])) for crop in tower_patches(stock, inputs)[0]]
        assert counts == share_total(40, [1 - value for value in rho], [PATCHES] * 5)
        assert sum(counts) == 40
        assert counts[2] == min(counts) < 8 < max(counts)

    def test_a_dynamic_budget_of_each_crop_follows_its_information(self, stock):
        ours = build(10, dynamic=True, reference_information=0.5)
        inputs = images([(56, 56)])
        (kept,) = ours.get_image_features(**inputs).keep_indices
        counts = torch.bincount(packed((56, 56))[kept] // PATCHES, minlength=5).tolist()
        rho = [float(redundancy(crop[None])) for crop in tower_patches(stock, inputs)[0]]
        assert counts == [min(int(10 * (1 - value) / 0.5 + 0.5), PATCHES) for value in rho]

    @pytest.mark.parametrize("minimum", [0, 1, 3])
    def test_shares_are_exact_bounded_and_nearest(self, minimum):
        generator = np.random.default_rng(0)
        for _ in range(300):
            views = int(generator.integers(1, 9))
            limits = generator.integers(0, 60, views).tolist()
            weights = generator.random(views).tolist()
            smallest = sum(min(minimum, limit) for limit in limits)
            total = int(generator.integers(smallest, sum(limits) + 1))
            shares = share_total(total, weights, limits, minimum)
            assert sum(shares) == total
            assert all(min(minimum, limit) <= share <= limit for share, limit in zip(shares, limits))
            free = [view for view in range(views) if min(minimum, limits[view]) < shares[view]]
            for giver in free:  # no token would be better placed with another view
                for taker in range(views):
                    if shares[taker] < limits[taker]:
                        gain = weights[taker] / (shares[taker] + 0.5)
                        assert gain <= weights[giver] / (shares[giver] - 0.5) + 1e-9

    def test_equal_weights_level_the_shares_below_the_limits(self):
        assert share_total(25, [1.0] * 4, [49, 3, 0, 49]) == [11, 3, 0, 11]
        assert share_total(3, [0.0] * 3, [9, 9, 9]) == [1, 1, 1]


class TestOff:
    @pytest.mark.parametrize("budget, scope", [(None, "view"), (1.0, "image"), (PATCHES, "view"), (10**6, "image")])
    def test_bit_identical_to_the_stock_class(self, budget, scope):
        ours = build(budget, budget_scope=scope)
        stock, inputs = stock_twin(ours), full_batch()
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        with torch.no_grad():
            output, expected = ours(**inputs, labels=labels), stock(**inputs, labels=labels)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        assert "keep_mask" not in output
        assert torch.equal(new_tokens(ours, inputs), new_tokens(stock, inputs))

    def test_the_same_model_switches(self, ours, stock):
        inputs = full_batch()
        assert not torch.equal(new_tokens(ours, inputs), new_tokens(stock, inputs))
        assert torch.equal(new_tokens(ours, inputs, num_visual_tokens=1.0), new_tokens(stock, inputs))
        ours.config.prunesid_config.budget = None
        assert torch.equal(new_tokens(ours, inputs), new_tokens(stock, inputs))


class TestGenerate:
    MODES = {
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampling": {"do_sample": True, "num_return_sequences": 2},
        "no cache": {"use_cache": False},
        "chunked prefill": {"prefill_chunk_size": 7},
    }

    @pytest.mark.parametrize("mode", MODES)
    def test_answers_are_those_of_the_stock_class_on_the_kept_features(self, ours, stock, mode):
        one_image_a_row = [((0,), [7, 8, 9]), ((2,), [9, 4]), ((), [3, 4, 5, 6]), ((4,), [11])]
        pixels = images([SIZES[0], SIZES[2], SIZES[4]])
        kept = ours.get_image_features(**pixels).keep_indices
        short = batch(rows(short_count, one_image_a_row))
        torch.manual_seed(0)
        answer = new_tokens(ours, {**batch(rows(full_count, one_image_a_row)), **pixels}, **self.MODES[mode])
        torch.manual_seed(0)
        features = {"image": oracle_features(stock, pixels, kept)}
        expected = new_tokens(stock, {**short, "mm_encoder_outputs": features}, **self.MODES[mode])
        assert torch.equal(answer, expected)

    def test_prompt_lookup(self, ours):
        inputs = {**batch(rows(full_count, ROWS[:1])), **images(SIZES[:2])}
        assert torch.equal(new_tokens(ours, inputs, prompt_lookup_num_tokens=2), new_tokens(ours, inputs))

    def test_a_batch_of_several_images_a_row_scores_like_single_rows_padded_on_the_right(self, ours):
        inputs, pixels = full_batch("right"), images()
        with torch.no_grad():
            logits = ours(**inputs)
        indices, first = ours.get_image_features(**pixels).keep_indices, 0
        for row, (shown, _) in enumerate(ROWS):
            alone = batch(rows(full_count, ROWS[row : row + 1]))
            for image in shown:
                own = {name: value[image : image + 1] for name, value in pixels.items()}
                assert torch.equal(ours.get_image_features(**own).keep_indices[0], indices[image])
            if shown:
                alone.update({name: value[first : first + len(shown)] for name, value in pixels.items()})
            first += len(shown)
            with torch.no_grad():
                expected = ours(**alone).logits[0]
            torch.testing.assert_close(logits.logits[row][: len(expected)], expected, rtol=1e-3, atol=1e-3)


class TestForward:
    def test_the_base_model_shortens_as_well(self, ours):
        inputs = full_batch()
        with torch.no_grad():
            hidden = ours.model(**inputs).last_hidden_state
            assert torch.equal(ours.lm_head(hidden), ours(**inputs).logits)
        assert hidden.shape[:2] == inputs["input_ids"].shape

    @pytest.mark.slow
    def test_a_compiled_forward_agrees(self, ours):
        inputs = full_batch()
        is_token = inputs["attention_mask"] == 1  # a graph keeps padding that otherwise gives way
        with torch.no_grad():
            compiled = torch.compile(ours, backend="eager")(**inputs).logits
            expected = ours(**inputs).logits
        # Columns of other numbers have rotary embeddings in float32.
        torch.testing.assert_close(compiled[is_token], expected[is_token], atol=1e-4, rtol=0)

    def test_half_precision(self, ours):
        ours.to(torch.bfloat16)
        inputs = full_batch()
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        assert ours(**inputs).logits.isfinite().all()


class TestErrors:
    @pytest.mark.parametrize("count", [full_count, short_count], ids=["full", "short"])
    @pytest.mark.parametrize("call", ["forward", "generate", "base"])
    def test_a_forgotten_image(self, ours, call, count):
        function = {"forward": ours, "generate": ours.generate, "base": ours.model}[call]
        with pytest.raises(ValueError, match="but no image; pass pixel_values"):
            function(**batch(rows(count, ROWS[:1])))

    @pytest.mark.parametrize("call", ["forward", "generate", "base"])
    def test_another_number_of_placeholders(self, ours, call):
        inputs = {**batch([prompt([41], [7])]), **images(SIZES[:1])}
        function = {"forward": ours, "generate": ours.generate, "base": ours.model}[call]
        with pytest.raises(ValueError, match=r"Image features and image tokens do not match, tokens: 41"):
            function(**inputs)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_visual_tokens": [5]}, "one count for each of the 5 .* got 1"),
            ({"num_visual_tokens": [2, 50, 50, 50, 50]}, "num_visual_tokens=2 gives 2 tokens to an input of 5 views"),
            ({"num_visual_tokens": 0}, "num_visual_tokens must be a positive integer.* got 0"),
            ({"num_visual_tokens": "7"}, "num_visual_tokens must be a positive integer.* got '7'"),
            ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'.*'default'"),
            ({"image_sizes": torch.tensor(SIZES[:2])}, r"pixel_values of shape .* 2 image_sizes"),
            ({"vision_feature_layer": 9}, "vision_feature_layer must lie in"),
        ],
    )
    def test_what_cannot_be_done_is_named(self, ours, arguments, message):
        with pytest.raises(ValueError, match=message):
            ours.get_image_features(**{**images(), **arguments})

    def test_a_tower_without_cls(self):
        siglip = {"model_type": "siglip_vision_model"}
        ours = build(vision=siglip, strategy="full")
        inputs, stock = images(), stock_twin(ours)
        output, whole = ours.get_image_features(**inputs), stock.model.get_image_features(**inputs).pooler_output
        for features, kept, expected in zip(output.pooler_output, output.keep_indices, whole):
            torch.testing.assert_close(features, expected[kept])
        with pytest.raises(ValueError, match="keep_cls=True, which needs a vision tower with a CLS token"):
            build(vision=siglip, strategy="full", keep_cls=True).get_image_features(**inputs)
        with pytest.raises(ValueError, match="tower: it has no CLS token. Set it to 'full'"):
            build(vision=siglip).get_image_features(**inputs)


def build_processor(**settings):
    words = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<unk>", 4: "what", 5: "is", 6: "this", IMAGE: "<image>"}
    tokenizer = word_tokenizer(words, ["<image>"], padding_side="left")
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": CROP}, crop_size={"height": CROP, "width": CROP}, image_grid_pinpoints=GRIDS
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    return PruneSIDLlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        **settings,
    )


def pictures(sizes=SIZES):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


class TestProcessor:
    CHAT = ["<image> what <image> is", "this <image>", "what is", "<image> is <image> this"]

    @pytest.mark.parametrize(
        "settings",
        [
            {"budget": 6},
            {"budget": 0.2},
            {"budget": 30, "budget_scope": "image"},
            {"budget": 0.2, "budget_scope": "image"},
        ],
        ids=["crop", "share of a crop", "image", "share of an image"],
    )
    def test_short_prompts_are_what_the_model_keeps(self, settings):
        budget, scope = settings["budget"], settings.get("budget_scope", "view")
        processor = build_processor(num_visual_tokens=budget, budget_scope=scope)
        inputs = processor(images=pictures(), text=self.CHAT, padding=True, return_tensors="pt")
        ours = build(None)
        kept = ours.get_image_features(
            pixel_values=inputs["pixel_values"],
            image_sizes=inputs["image_sizes"],
            num_visual_tokens=inputs["num_visual_tokens"],
        ).keep_indices
        assert inputs["num_visual_tokens"].tolist() == [len(indices) for indices in kept]
        assert int((inputs["input_ids"] == IMAGE).sum()) == sum(map(len, kept))
        sizes = processor._get_num_multimodal_tokens(image_sizes=SIZES).num_image_tokens
        assert sizes == inputs["num_visual_tokens"].tolist()
        by_itself = build(**settings).get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        )
        assert all(torch.equal(one, other) for one, other in zip(kept, by_itself.keep_indices))
        short = new_tokens(ours, dict(inputs))
        full = build_processor()(images=pictures(), text=self.CHAT, padding=True, return_tensors="pt")
        assert torch.equal(new_tokens(build(**settings), dict(full)), short)

    def test_without_a_budget_it_is_the_stock_processor(self):
        inputs = build_processor()(images=pictures(), text=self.CHAT, padding=True, return_tensors="pt")
        assert "num_visual_tokens" not in inputs
        assert int((inputs["input_ids"] == IMAGE).sum()) == sum(map(full_count, SIZES))
        assert build_processor()._get_num_multimodal_tokens(image_sizes=SIZES).num_image_tokens == list(
            map(full_count, SIZES)
        )

    def test_a_call_may_ask_for_another_budget(self):
        processor = build_processor(num_visual_tokens=6)
        inputs = processor(images=pictures(SIZES[:1]), text="<image> what", num_visual_tokens=9, return_tensors="pt")
        assert int((inputs["input_ids"] == IMAGE).sum()) == short_count(SIZES[0], 9)
        assert processor._get_num_multimodal_tokens(image_sizes=SIZES[:1], num_visual_tokens=9).num_image_tokens == [
            short_count(SIZES[0], 9)
        ]

    @pytest.mark.parametrize("scope", ["view", "image"])
    def test_what_is_set_later_is_obeyed(self, tmp_path, scope):
        check_what_is_set_is_obeyed(
            build_processor(num_visual_tokens=6, budget_scope=scope),
            tmp_path,
            lambda processor: processor(images=pictures(), text=self.CHAT, padding=True, return_tensors="pt"),
        )

    def test_an_invalid_setting_is_refused(self):
        with pytest.raises(ValueError, match="budget_scope must be one of"):
            build_processor(num_visual_tokens=6, budget_scope="crop")
        with pytest.raises(ValueError, match="num_visual_tokens must be a positive integer"):
            build_processor(num_visual_tokens=-1)


CLEAN_PROCESS = """
import json, sys, torch
sys.modules["modeling_prunesid"] = None
from PIL import Image
from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                          pipeline)
repo = sys.argv[1]
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(repo, **trust)
image = Image.open(sys.argv[2])
inputs = processor(images=image, text="<image> what is", return_tensors="pt")
answers, missing = [], []
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model, info = auto_class.from_pretrained(repo, output_loading_info=True, **trust)
    missing += [*info["missing_keys"], *info["unexpected_keys"]]
    answers.append(model.generate(**inputs, do_sample=False, max_new_tokens=5).tolist())
base = AutoModel.from_config(AutoConfig.from_pretrained(repo, **trust), **trust)
pipe = pipeline("image-text-to-text", model=repo, processor=processor, **trust)
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is"}]}]
text = pipe(text=chat, generate_kwargs={"do_sample": False, "max_new_tokens": 5}, return_full_text=False)
print(json.dumps({
    "answers": answers, "missing": missing, "base": type(base).__name__, "generates": hasattr(base, "generate"),
    "model": type(model).__name__, "processor": type(processor).__name__, "kept": inputs["num_visual_tokens"].tolist(),
    "pipeline": text[0]["generated_text"], "decoded": processor.batch_decode([a[0][-5:] for a in answers]),
}))
"""


class TestLoading:
    @pytest.mark.contract
    def test_a_saved_repo_works_in_a_process_without_this_package(self, ours, tmp_path):
        repo, (picture,) = tmp_path / "repo", pictures(SIZES[:1])
        ours.save_pretrained(repo)
        processor = build_processor(num_visual_tokens=BUDGET)
        processor.save_pretrained(repo)
        picture.save(tmp_path / "picture.png")
        inputs = processor(images=picture, text="<image> what is", return_tensors="pt")
        expected = ours.generate(**inputs, do_sample=False, max_new_tokens=5)
        shutil.copytree(repo, tmp_path / "moved")
        report = run_clean(CLEAN_PROCESS, tmp_path / "home", tmp_path / "moved", tmp_path / "picture.png")
        assert report["answers"] == [expected.tolist()] * 3
        assert report["missing"] == []
        assert report["base"] == "PruneSIDLlavaNextModel"
        assert report["model"] == "PruneSIDLlavaNextForConditionalGeneration"
        assert report["processor"] == "PruneSIDLlavaNextProcessor"
        assert report["kept"] == [short_count(SIZES[0])]
        assert report["pipeline"].split() == report["decoded"][0].split()


@pytest.mark.parametrize(("total", "crop"), [(640, 128), (320, 64), (160, 32)])
def test_presets_are_the_papers(total, crop):
    folder = Path(__file__).parents[1] / "configuration"
    settings = PruneSIDConfig.from_pretrained(folder / f"llava_next_{total}_{crop}_per_crop.json")
    views = views_of_crops((672, 672), LlavaNextConfig().image_grid_pinpoints, 336, 14)
    assert [len(view.rows) for view in views] == [576] * 5
    assert 5 * crop == total
    assert settings.to_dict() == PruneSIDConfig(budget=crop).to_dict()
