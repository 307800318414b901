"""
Processors of the declared families: what they write is what the model keeps, and the text between placeholders stays.

A row names the parts of a stock processor that fits the tiny model of the same name in `families.py`. Those that need
torchvision have rows only where it is installed: `test_torchvision_processors.py` runs them.
"""

import importlib.util

import numpy as np
import pytest
import torch
from families import PAD, ROWS, SHIPPED, is_at_least
from PIL import Image
from tiny_processors import PROCESSORS, SINCE, SINCE_OF_VIDEOS

import modeling_prunesid


ROWS_OF = [
    name
    for name, (_, _, needs) in PROCESSORS.items()
    if ROWS[name].is_installed
    and is_at_least(SINCE.get(name, SHIPPED))
    and all(importlib.util.find_spec(package) for package in needs)
]
# Upstream makes arrays of PaliGemma's tensors in a way that NumPy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept"),
]
every_processor = pytest.mark.parametrize("name", ROWS_OF)


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(64, 40, 0), picture(30, 33, 1), picture(90, 30, 2)]
# Budgets of a view, where it has fewer tokens than five.
FEW_TOKENS = {
    **dict.fromkeys(("step3p7", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "perception_lm"), (2, 0.5)),
    "inkling_mm_model": (1, 0.5),
}


def pictures_of(name):
    """Images as their processor takes them together: PerceptionLM's of one number of tiles."""
    return [PICTURES[0]] * 3 if name == "perception_lm" else PICTURES


def classes(name):
    prefix = {"paligemma": "PaliGemma"}.get(name, modeling_prunesid.families.FAMILIES[name])
    ours = getattr(modeling_prunesid, f"PruneSID{prefix}Processor")
    return ours, next(base for base in ours.__mro__ if base.__module__.startswith("transformers.models."))


def make(name, cls, **settings):
    processor = cls(**PROCESSORS[name][0](), **settings)
    if name in ("got_ocr2", "pp_chart2table"):  # no argument
        processor.num_image_tokens = 16
    return processor


def ask(name, processor, rows=((0, 1), (2,)), **kwargs):
    token = PROCESSORS[name][1]
    texts = ["word7 " + f"{token} word9 " * len(row) + "word11" for row in rows]
    images = [[pictures_of(name)[index] for index in row] for row in rows]
    if name in ("got_ocr2",):  # takes pictures one behind the other
        images = [picture for row in images for picture in row]
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


def counts(name, inputs):
    return (inputs["input_ids"] == ROWS[name].token).sum(1).tolist()


def words(name, inputs):
    """The prompts without placeholders and padding."""
    return [[int(token) for token in row if token not in (ROWS[name].token, PAD)] for row in inputs["input_ids"]]


def build_model(name, budget):
    row = ROWS[name]
    torch.manual_seed(0)
    config = row.head.config_class(**row.config, prunesid_config={"budget": budget})
    model = row.head(config).double().eval()
    if row.prepare is not None:
        row.prepare(model)
    return model, row


@every_processor
def test_without_a_budget_the_stock_prompt_is_written(name):
    ours, stock = classes(name)
    got, expected = ask(name, make(name, ours)), ask(name, make(name, stock))
    assert set(got) - set(expected) <= {"num_tiles", "num_patches"}
    assert all(torch.equal(torch.as_tensor(got[key]), torch.as_tensor(expected[key])) for key in expected)


@every_processor
@pytest.mark.parametrize("of_images", [False, True])
def test_a_call_may_ask_for_full_prompts(name, of_images):
    """They leave the budget to the model."""
    ours, _ = classes(name)
    request = {"num_visual_tokens": "full"}
    got = ask(name, make(name, ours, num_visual_tokens=1), **({"images_kwargs": request} if of_images else request))
    expected = ask(name, make(name, ours))
    assert set(got) == set(expected)
    assert all(torch.equal(torch.as_tensor(got[key]), torch.as_tensor(expected[key])) for key in expected)


@every_processor
@torch.no_grad()
def test_short_prompts_are_what_the_model_keeps(name):
    ours, _ = classes(name)
    full = ask(name, make(name, ours))
    model, _ = build_model(name, None)
    for budget in FEW_TOKENS.get(name, (5, 0.25)):
        short = ask(name, make(name, ours, num_visual_tokens=budget))
        assert words(name, short) == words(name, full)
        assert counts(name, short) < counts(name, full)
        model.config.prunesid_config.budget = budget
        assert counts(name, short) == [
            int(short["num_visual_tokens"][:2].sum()),
            int(short["num_visual_tokens"][2:].sum()),
        ]
        outputs = [model(**as_double(inputs)) for inputs in (full, short)]
        lengths = [int(row.sum()) for row in short["attention_mask"]]
        for place, length in enumerate(lengths):
            logits = [
                outputs[0].logits[place][outputs[0].keep_mask[place]][-length:],
                part(outputs[1].logits[place], short, place, length),
            ]
            assert torch.allclose(*logits, rtol=0, atol=1e-6 * float(logits[0].abs().max()))


def part(logits, inputs, place, length):
    """The columns of one row that are no padding, in a batch that was shortened."""
    return logits[-length:] if inputs["attention_mask"][place, 0] == 0 else logits[:length]


def as_double(inputs):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@every_processor
def test_totals_of_an_image(name):
    ours, _ = classes(name)
    inputs = ask(name, make(name, ours, num_visual_tokens=7, budget_scope="image"))
    full = counts(name, ask(name, make(name, ours), ((0,), (1,), (2,))))
    totals = [min(7, tokens) for tokens in full]
    assert inputs["num_visual_tokens"].tolist() == totals
    assert counts(name, inputs) == [sum(totals[:2]), totals[2]]


@every_processor
def test_a_call_may_have_its_own_budget(name):
    ours, _ = classes(name)
    processor = make(name, ours)
    expected = ask(name, make(name, ours, num_visual_tokens=3))
    assert torch.equal(ask(name, processor, num_visual_tokens=3)["input_ids"], expected["input_ids"])


@every_processor
def test_counts_for_engines_are_those_of_the_prompts(name):
    ours, stock = classes(name)
    processor = make(name, ours, num_visual_tokens=5)
    if not hasattr(stock, "_get_num_multimodal_tokens"):
        return
    sizes = [(picture.height, picture.width) for picture in pictures_of(name)]
    if processor.has_deepstack:
        with pytest.raises(ValueError, match="deepstack features of later ones"):
            processor._get_num_multimodal_tokens(image_sizes=sizes)
        return
    full = make(name, stock)._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    short = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    alone = ((0,), (1,), (2,))
    written = [counts(name, ask(name, each, alone)) for each in (make(name, ours), processor)]
    assert [before - after for before, after in zip(full, short)] == [
        before - after for before, after in zip(*written)
    ]


# What stands for a video in a prompt.
VIDEO_TEXTS = {
    "internvl": "<video>",
    "llava_onevision": "<video>",
    "llava_next_video": "<video>",
    "gemma4": "<|video|>",
    "kimi_k25": "<video>",
    "molmo2": "<|video|>",
    "minicpmv4_6": "<video_pad>",
    "video_llama_3": "<video>",
    "smolvlm": "<video>",
    "perception_lm": "<video>",
    "minicpm_ocr": "<video_pad>",
    "minicpmv4_7": "<video_pad>",
    "gemma4_unified": "<|video|>",
    "nemotron_h_omni": "<video>",
}
# Processors that ask which row an image is of.
PICTURES_BY_ROW = ("gemma4", "gemma4_unified")


def clip(frames, seed):
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)


def ask_of_videos(name, processor):
    """
    An image and a video in a row, a video in the other. Molmo 2 and SmolVLM take no images beside videos (SmolVLM's
    processor drops their pixels), and Nemotron H Omni no second row either.
    """
    image, film = PROCESSORS[name][1], VIDEO_TEXTS[name]
    images = {"images": [[PICTURES[0]], []] if name in PICTURES_BY_ROW else [[PICTURES[0]]]}
    texts, clips = [f"word7 {image} word9 {film} word11", f"word7 {film} word12"], [[clip(4, 0)], [clip(4, 1)]]
    if name in ("molmo2", "smolvlm", "nemotron_h_omni"):
        images, texts[0] = {}, f"word7 {film} word11"
    if name == "nemotron_h_omni":
        texts, clips = [" ".join(texts)], [[clip(4, 0), clip(4, 1)]]
    metadata = {"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3], "duration": 2.0}
    return processor(
        **images,
        videos=clips,
        text=texts,
        padding=True,
        return_tensors="pt",
        do_sample_frames=False,
        video_metadata=[[metadata] * len(row) for row in clips],
    )


VIDEO_ROWS = [name for name in ROWS_OF if name in VIDEO_TEXTS and is_at_least(SINCE_OF_VIDEOS.get(name, SHIPPED))]
if VIDEO_ROWS:  # all of them need torchvision

    @pytest.mark.parametrize("name", VIDEO_ROWS)
    @torch.no_grad()
    def test_short_prompts_of_images_and_videos_are_what_the_model_keeps(name):
        ours, stock = classes(name)
        full, expected = ask_of_videos(name, make(name, ours)), ask_of_videos(name, make(name, stock))
        assert all(torch.equal(torch.as_tensor(full[key]), torch.as_tensor(expected[key])) for key in expected)
        model, _ = build_model(name, None)
        for budget in FEW_TOKENS.get(name, (5, 0.25)):
            short = ask_of_videos(name, make(name, ours, num_visual_tokens=budget))
            model.config.prunesid_config.budget = budget
            outputs = [model(**as_double(inputs)) for inputs in (full, short)]
            assert short["input_ids"].shape[1] < full["input_ids"].shape[1]
            lengths = [int(own.sum()) for own in short["attention_mask"]]
            for place, length in enumerate(lengths):
                logits = [
                    outputs[0].logits[place][outputs[0].keep_mask[place]][-length:],
                    part(outputs[1].logits[place], short, place, length),
                ]
                assert torch.allclose(*logits, rtol=0, atol=1e-6 * float(logits[0].abs().max()))


@every_processor
def test_a_text_without_the_placeholder_is_an_error(name, monkeypatch):
    if name == "idefics2":  # shortens what it writes before it is written
        return
    processor = make(name, classes(name)[0], num_visual_tokens=1)
    monkeypatch.setattr(type(processor), "_placeholder", lambda self, modality: "<other>")
    with pytest.raises(
        ValueError, match=r"does not hold the placeholder '<other>' of PruneSID.* `tokenizer.image_token"
    ):
        ask(name, processor)


def test_upstreams_own_pruning_of_videos_is_refused():
    model, row = build_model("nemotron_h_omni video", 5)
    inputs = row.inputs([[0]])
    model.video_pruning_rate = 0.5
    with pytest.raises(ValueError, match=r"video_pruning_rate=0.5 .* Pass video_pruning_rate=0"):
        model.views("video", inputs, [32])
    model.video_pruning_rate = 0.0
    with pytest.raises(ValueError, match=r"\(videos, frames or slices, .* Transformers 5.24 .* got \(2, 6, 32, 32\)"):
        model.views("video", {"pixel_values_videos": inputs["pixel_values_videos"][0]}, [32])
