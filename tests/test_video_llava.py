"""
Video-LLaVA. The oracle is the stock class: its features of whole images and clips say what belongs at each
placeholder, and its `generate`, on short prompts and the kept ones of these features, says what must be answered.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import VIDEO_LLAVA_PIXELS
from tiny import IMAGE, NUM_PATCHES, batch, stock_twin
from tiny_llava_next import new_tokens
from tiny_video_llava import (
    BUDGET,
    FED,
    FRAMES,
    ROWS,
    VIDEO,
    build,
    clips,
    full_batch,
    images,
    rows,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid import (
    PruneSIDConfig,
)
from modeling_prunesid.budgets import share_total
from modeling_prunesid.dynamic import redundancy
from modeling_prunesid.frame_information import frame_information
from modeling_prunesid.select_tokens import select_tokens


def information_of_clip(frames):
    return frame_information(frames, [NUM_PATCHES] * len(frames), [0])


@pytest.fixture
def ours():
    return build()


@torch.no_grad()
def whole_features(stock, image_pixels, video_pixels):
    """Of each image and of each clip, all that upstream feeds."""
    of_images = stock.model.get_image_features(**{VIDEO_LLAVA_PIXELS: image_pixels}).pooler_output
    of_clips = stock.model.get_video_features(pixel_values_videos=video_pixels).pooler_output
    return list(of_images), list(of_clips.reshape(len(video_pixels), -1, of_clips.shape[-1]))


@torch.no_grad()
def tower_patches(stock, video):
    return stock.model.video_tower(video, output_hidden_states=True).hidden_states[-2][:, 1:]


def counts_of_frames(kept, frames=FRAMES):
    return torch.bincount(kept // FED, minlength=frames).tolist()


class TestSelection:
    def test_the_cls_token_of_a_frame_is_kept_and_counts(self, ours, stock):
        for video, kept in zip(clips(), ours.model.get_video_features(pixel_values_videos=clips()).keep_indices):
            chosen = select_tokens(tower_patches(stock, video), BUDGET - 1, extra_kept=1).indices
            expected = [
                torch.cat([torch.tensor([0]), patches + 1]) + frame * FED for frame, patches in enumerate(chosen)
            ]
            assert torch.equal(kept, torch.cat(expected))

    def test_spread_measures_distances_of_projected_tokens(self, ours, stock, monkeypatch):
        monkeypatch.setattr(ours.config.prunesid_config, "method", "spread")
        monkeypatch.setattr(ours.config.prunesid_config, "method_settings", {"score": "component"})
        for video, kept in zip(clips(), ours.model.get_video_features(pixel_values_videos=clips()).keep_indices):
            patches = tower_patches(stock, video)
            projected = stock.model.multi_modal_projector(patches)
            options = {"extra_kept": 1, "quota": "spread"}
            chosen = select_tokens(patches, BUDGET - 1, projected=projected, **options).indices
            expected = (chosen + 1 + FED * torch.arange(FRAMES)[:, None]).flatten()
            assert kept[kept % FED > 0].tolist() == expected.tolist()

    def test_the_cls_token_of_an_image_is_left_out_as_upstream_does(self, stock):
        kept = build().get_image_features(**{VIDEO_LLAVA_PIXELS: images()}).keep_indices
        assert [len(indices) for indices in kept] == [BUDGET, BUDGET]
        assert min(int(indices.min()) for indices in kept) >= 0
        for indices in build(keep_cls=True).get_image_features(**{VIDEO_LLAVA_PIXELS: images()}).keep_indices:
            assert len(indices) == BUDGET
            assert (indices == -1).tolist() == [True] + [False] * (BUDGET - 1)

    def test_both_names_of_the_pixels(self, ours):
        """Transformers 5.18 to 5.22 know one of them."""
        one = ours.get_image_features(**{VIDEO_LLAVA_PIXELS: images()}).keep_indices
        other = ours.get_image_features(pixel_values_images=images()).keep_indices
        assert all(torch.equal(*pair) for pair in zip(one, other))
        inputs = full_batch()
        pixels = inputs.pop(VIDEO_LLAVA_PIXELS)
        with torch.no_grad():
            assert torch.equal(
                ours(**inputs, **{VIDEO_LLAVA_PIXELS: pixels}).logits,
                ours(**inputs, pixel_values_images=pixels).logits,
            )

    def test_attention_scores(self):
        ours = build(score="cls_attention", quota="bounded")
        kept = ours.model.get_video_features(pixel_values_videos=clips()).keep_indices
        assert [counts_of_frames(indices) for indices in kept] == [[BUDGET] * FRAMES] * 2


class TestTotals:
    @pytest.mark.parametrize("dynamic", [False, True], ids=["equal", "dynamic"])
    @pytest.mark.parametrize("budget", [25, 0.2], ids=["count", "share"])
    def test_the_total_of_a_clip_is_exact(self, budget, dynamic):
        ours = build(budget, budget_scope="image", dynamic=dynamic)
        for kept in ours.model.get_video_features(pixel_values_videos=clips()).keep_indices:
            assert len(kept) == (budget if isinstance(budget, int) else FRAMES * FED // 5)

    def test_an_equal_total_is_the_budget_of_each_frame(self, ours):
        totals = [BUDGET * FRAMES] * 2
        by_frame = ours.model.get_video_features(pixel_values_videos=clips()).keep_indices
        by_clip = ours.model.get_video_features(pixel_values_videos=clips(), num_visual_tokens=totals).keep_indices
        assert all(torch.equal(*pair) for pair in zip(by_frame, by_clip))

    def test_static_frames_cost_little(self):
        video = clips(1, frames=5)
        video[:, 1] = video[:, 0]
        video[:, 3] = video[:, 2]
        ours = build(40, budget_scope="image", dynamic=True)
        (kept,) = ours.model.get_video_features(pixel_values_videos=video).keep_indices
        counts = counts_of_frames(kept, frames=5)
        assert sum(counts) == 40
        assert counts[1] == counts[3] == 2  # the CLS token and one patch
        assert min(counts[0], counts[2], counts[4]) > 8

    def test_the_information_of_frames(self, stock):
        frames = tower_patches(stock, clips(1)[0])
        frames = torch.cat([frames, frames[-1:], frames[-1:] + 0.05 * torch.randn(1, NUM_PATCHES, 32)])
        information = information_of_clip(frames)
        scores = 1 - redundancy(frames)
        assert information[0] == float(scores[0])
        for frame in range(1, len(frames)):
            change = (1 - torch.cosine_similarity(frames[frame], frames[frame - 1], dim=-1)).mean()
            assert information[frame] == pytest.approx(min(float(scores[frame]), float(change)), abs=1e-6)
        assert information[3] == pytest.approx(0, abs=1e-6)
        assert 0 < information[4] < information[0]
        ours = build(30, budget_scope="image", dynamic=True)
        (kept,) = ours.model.get_video_features(pixel_values_videos=clips(1)).keep_indices
        weights = information_of_clip(tower_patches(stock, clips(1)[0]))
        assert counts_of_frames(kept) == share_total(30, weights, [FED] * FRAMES, minimum=2)

    def test_a_dynamic_budget_of_each_frame_follows_the_paper(self, stock):
        ours = build(10, dynamic=True, reference_information=0.5)
        (kept,) = ours.model.get_video_features(pixel_values_videos=clips(1)).keep_indices
        scores = 1 - redundancy(tower_patches(stock, clips(1)[0])).double()
        assert counts_of_frames(kept) == [int(10 * float(score) / 0.5 + 0.5) for score in scores]

    def test_listed_totals_are_for_images_and_then_for_clips(self, ours):
        totals = [5, 9, 20, NUM_PATCHES * FRAMES]
        output = ours(**full_batch(), num_visual_tokens=totals)
        words = [len(text) + 1 + one + other for (one, other), text in ROWS]
        assert output.keep_mask.sum(1).tolist() == [
            words[0] + 5 + 20, words[1] + NUM_PATCHES * FRAMES, words[2], words[3] + 9
        ]  # fmt: skip
        assert torch.equal(
            new_tokens(ours, full_batch(), num_visual_tokens=totals),
            new_tokens(ours, full_batch(), num_visual_tokens=torch.tensor(totals)),
        )
        assert torch.equal(
            new_tokens(ours, full_batch(), num_visual_tokens=totals),
            new_tokens(ours, full_batch(), num_visual_tokens=tuple(totals)),
        )


class TestOff:
    @pytest.mark.parametrize("budget, scope", [(None, "view"), (1.0, "image"), (10**6, "view")])
    def test_bit_identical_to_the_stock_class(self, budget, scope):
        ours = build(budget, budget_scope=scope)
        stock, inputs = stock_twin(ours), full_batch()
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
        with torch.no_grad():
            output, expected = ours(**inputs, labels=labels), stock(**inputs, labels=labels)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.video_hidden_states, expected.video_hidden_states)
        assert torch.equal(new_tokens(ours, inputs), new_tokens(stock, inputs))

    def test_the_same_model_switches(self, ours, stock):
        inputs = full_batch()
        assert torch.equal(new_tokens(ours, inputs, num_visual_tokens=1.0), new_tokens(stock, inputs))
        assert not torch.equal(new_tokens(ours, inputs), new_tokens(stock, inputs))


class TestGenerate:
    MODES = {
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampling": {"do_sample": True, "num_return_sequences": 2},
        "no cache": {"use_cache": False},
        "chunked prefill": {"prefill_chunk_size": 7},
    }

    @pytest.mark.parametrize("mode", MODES)
    def test_answers_are_those_of_the_stock_class_on_the_kept_features(self, ours, stock, mode):
        inputs = full_batch()
        short = batch(rows(BUDGET, FRAMES * BUDGET))
        torch.manual_seed(0)
        answer = new_tokens(ours, inputs, **self.MODES[mode])
        encoded = {}
        for modality, output, whole in zip(
            ("image", "video"),
            (
                ours.get_image_features(**{VIDEO_LLAVA_PIXELS: inputs[VIDEO_LLAVA_PIXELS]}),
                ours.model.get_video_features(pixel_values_videos=inputs["pixel_values_videos"]),
            ),
            whole_features(stock, inputs[VIDEO_LLAVA_PIXELS], inputs["pixel_values_videos"]),
        ):
            kept = torch.stack([view[indices] for view, indices in zip(whole, output.keep_indices)])
            encoded[modality] = BaseModelOutputWithPooling(pooler_output=kept)
        torch.manual_seed(0)
        expected = new_tokens(stock, {**short, "mm_encoder_outputs": encoded}, **self.MODES[mode])
        assert torch.equal(answer, expected)


class TestForward:
    def test_the_base_model_shortens_as_well(self, ours):
        with torch.no_grad():
            hidden = ours.model(**full_batch()).last_hidden_state
            assert torch.equal(ours.lm_head(hidden), ours(**full_batch()).logits)
        assert hidden.shape[:2] == full_batch()["input_ids"].shape


class TestErrors:
    @pytest.mark.parametrize("tokens", [FED, BUDGET], ids=["full", "short"])
    @pytest.mark.parametrize("call", ["forward", "generate", "base"])
    def test_a_forgotten_clip(self, ours, call, tokens):
        function = {"forward": ours, "generate": ours.generate, "base": ours.model}[call]
        with pytest.raises(ValueError, match="but no video; pass pixel_values_videos"):
            function(**batch(rows(0, FRAMES * tokens, ROWS[1:2])))

    @pytest.mark.parametrize("call", ["forward", "generate", "base"])
    def test_another_number_of_placeholders(self, ours, call):
        inputs = {**batch([[1, *[VIDEO] * 41, 7]]), "pixel_values_videos": clips(1)}
        function = {"forward": ours, "generate": ours.generate, "base": ours.model}[call]
        with pytest.raises(ValueError, match=r"Video features and video tokens do not match, tokens: 41"):
            function(**inputs)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_visual_tokens": [5]}, "one count for each of the 2 .* got 1"),
            ({"num_visual_tokens": 1}, "num_visual_tokens=1 gives 3 tokens .* 3 views .* at least 6: 2 of each"),
            ({"num_visual_tokens": 0}, "num_visual_tokens must be a positive integer.* got 0"),
            ({"vision_feature_layer": 9}, "vision_feature_layer must lie in"),
        ],
    )
    def test_what_cannot_be_done_is_named(self, ours, arguments, message):
        with pytest.raises(ValueError, match=message):
            ours.model.get_video_features(**{"pixel_values_videos": clips(), **arguments})

    def test_a_tower_without_cls(self):
        ours = build(vision={"model_type": "siglip_vision_model"})
        with pytest.raises(ValueError, match="siglip_vision_model tower: it has no CLS token. Set it to 'full'"):
            ours.model.get_image_features(**{VIDEO_LLAVA_PIXELS: images()})
        stock, frames = stock_twin(ours).model, clips()
        output = ours.model.get_video_features(pixel_values_videos=frames)
        whole = stock.get_video_features(pixel_values_videos=frames).pooler_output.reshape(len(frames), -1, 32)
        for features, kept, expected in zip(output.pooler_output, output.keep_indices, whole):
            assert torch.bincount(kept // NUM_PATCHES).tolist() == [BUDGET] * FRAMES
            torch.testing.assert_close(features, expected[kept])


PREPARE = """
import sys
folder, tests, torchvision = sys.argv[1:4]
sys.path[:0] = [tests]
from torchvision_shim import add_torchvision
library = add_torchvision(torchvision)
import json, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoConfig, AutoProcessor

def greedy(model, inputs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=5)[:, inputs["input_ids"].shape[1]:].tolist()

def ask(processor, **kwargs):
    text = ["<image> what <video> is", "this <video>", "what is", "<image> this"]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 40, 50), generator=generator, dtype=torch.uint8).numpy() for _ in range(2)]
    videos = [torch.randint(0, 256, (3, 40, 50, 3), generator=generator, dtype=torch.uint8).numpy() for _ in range(2)]
    arguments = {"text": text, "images": images, "videos": videos, "padding": True, "return_tensors": "pt", **kwargs}
    return processor(**arguments)
"""

WITH_PACKAGE = (
    PREPARE
    + """
import pathlib, tiny_processor, tiny_video_llava
from tiny_words import word_tokenizer
from transformers import VideoLlavaImageProcessor, VideoLlavaVideoProcessor
from modeling_prunesid import PruneSIDVideoLlavaProcessor

words = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", 4: "what", 5: "is", 6: "this", 100: "<image>", 101: "<video>"}
tokenizer = word_tokenizer(words, ["<image>", "<video>"], padding_side="left")
sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}

def build_processor(**settings):
    return PruneSIDVideoLlavaProcessor(image_processor=VideoLlavaImageProcessor(**sizes), tokenizer=tokenizer,
                                       video_processor=VideoLlavaVideoProcessor(**sizes), patch_size=4, **settings)

report = {"cases": []}
full = ask(build_processor())
assert "num_visual_tokens" not in full
report["full"] = [int((full["input_ids"] == token).sum()) for token in (100, 101)]
for budget, scope in ((6, "view"), (0.2, "view"), (20, "image"), (0.2, "image")):
    short = ask(build_processor(num_visual_tokens=budget, budget_scope=scope))
    off, ours = tiny_video_llava.build(None), tiny_video_llava.build(budget, budget_scope=scope)
    report["cases"].append({
        "kept": short["num_visual_tokens"].tolist(),
        "written": [int((short["input_ids"] == token).sum()) for token in (100, 101)],
        "answers": [greedy(off, short), greedy(ours, short), greedy(ours, full)],
    })
asked = ask(build_processor(num_visual_tokens=6), num_visual_tokens=9)
report["asked"] = asked["num_visual_tokens"].tolist()
only = ask(build_processor(num_visual_tokens=6), images=None, text=["<video> what", "this <video>"])
report["only clips"] = only["num_visual_tokens"].tolist()
tiny_processor.check_what_is_set_is_obeyed(
    build_processor(num_visual_tokens=6, budget_scope="image"), pathlib.Path(folder).with_name("set later"), ask
)
processor, ours = build_processor(num_visual_tokens=6), tiny_video_llava.build(6)
ours.save_pretrained(folder)
processor.save_pretrained(folder)
report["saved"] = greedy(ours, ask(processor))
print(json.dumps(report))
"""
)

WITHOUT_PACKAGE = (
    PREPARE
    + """
sys.modules["modeling_prunesid"] = None
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trust)
inputs = ask(processor)
report = {"answers": [], "keys": [], "processor": type(processor).__name__}
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **trust)
    report["keys"] += [*info["missing_keys"], *info["unexpected_keys"]]
    report["answers"].append(greedy(model, inputs))
report["base"] = type(AutoModel.from_config(AutoConfig.from_pretrained(folder, **trust), **trust)).__name__
print(json.dumps(report))
"""
)


@pytest.fixture(scope="module")
def saved(torchvision_folder, tmp_path_factory):
    """A saved repo, and what its processor and model said before that, in a process that has torchvision."""
    root = tmp_path_factory.mktemp("video_llava")
    report = run_script(WITH_PACKAGE, root / "repo", torchvision_folder, PYTHONPATH=str(Path(__file__).parents[1]))
    return root, report


def run_script(script, folder, torchvision_folder, **environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(Path(__file__).parent), str(torchvision_folder)],
        cwd=folder.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.contract
class TestProcessor:
    def test_without_a_budget_it_is_the_stock_processor(self, saved):
        assert saved[1]["full"] == [2 * NUM_PATCHES, 2 * FRAMES * FED]

    def test_short_prompts_are_what_the_model_keeps(self, saved):
        expected = [[6, 6, 18, 18], [10, 10, 30, 30], [20] * 4, [10, 10, 30, 30]]
        for case, kept in zip(saved[1]["cases"], expected, strict=True):
            assert case["kept"] == kept
            assert case["written"] == [sum(kept[:2]), sum(kept[2:])]
            assert case["answers"][0] == case["answers"][1] == case["answers"][2]

    def test_a_call_may_ask_for_another_budget(self, saved):
        assert saved[1]["asked"] == [9, 9, 27, 27]

    def test_clips_without_images(self, saved):
        assert saved[1]["only clips"] == [18, 18]

    def test_a_saved_repo_works_in_a_process_without_this_package(self, saved, torchvision_folder):
        root, report = saved
        moved = shutil.copytree(root / "repo", root / "moved")
        environment = {"HF_HOME": str(root / "home"), "PYTHONPATH": ""}
        again = run_script(WITHOUT_PACKAGE, Path(moved), torchvision_folder, **environment)
        assert again["answers"] == [report["saved"]] * 3
        assert again["keys"] == []
        assert again["base"] == "PruneSIDVideoLlavaModel"
        assert again["processor"] == "PruneSIDVideoLlavaProcessor"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("video_llava_136_17_per_frame", {"budget": 17}),
        ("video_llava_136_per_clip_dynamic", {"budget": 136, "budget_scope": "image", "dynamic": True}),
    ],
)
def test_presets(name, settings):
    folder = Path(__file__).parents[1] / "configuration"
    loaded = PruneSIDConfig.from_pretrained(folder / f"{name}.json")
    assert loaded.to_dict() == PruneSIDConfig(**settings).to_dict()
