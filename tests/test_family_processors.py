"""
Processors of the declared families: what they write is what the model keeps, and the text between placeholders stays.

A row names the parts of a stock processor that fits the tiny model of the same name in `families.py`. Those that need
torchvision have rows only where it is installed.
"""

import importlib.util

import numpy as np
import pytest
import torch
import transformers
from families import BOS, EOS, IMAGE, PAD, ROWS, VIDEO
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import modeling_prunesid


HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
SIZE = {"height": 32, "width": 32}


def tokenizer(specials, **names):
    """Words 0 to 119, some of them by other names; `names` are attributes as upstream's tokenizers have them."""
    words = [f"word{index}" for index in range(120)]
    for index, word in {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<unk>", **specials}.items():
        words[index] = word
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(specials.values()),
    )
    for name, word in names.items():
        setattr(made, name, word)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(word))
    return made


def pil(name, **settings):
    """The image processor that needs no torchvision where upstream has one."""
    cls = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return cls(**settings)


def video(name, **settings):
    return getattr(transformers, name)(**settings)


TILE_TAGS = {60 + 6 * row + col: f"<row_{row + 1}_col_{col + 1}>" for row in range(6) for col in range(6)}
GRIDS = [[32, 64], [64, 32], [64, 64]]
# Family: what makes its processor's parts, the text that stands for an image, whether it needs torchvision.
PROCESSORS = {
    "vipllava": (
        lambda: {
            "image_processor": pil("CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=SIZE),
            "tokenizer": tokenizer({IMAGE: "<image>"}),
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "<image>",
        False,
    ),
    "paligemma": (
        lambda: {
            "image_processor": pil("SiglipImageProcessor", size=SIZE, image_seq_length=64),
            "tokenizer": tokenizer({IMAGE: "<image>"}, image_token="<image>"),
        },
        "<image>",
        False,
    ),
    "idefics3": (
        lambda: {
            "image_processor": pil(
                "Idefics3ImageProcessor", size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
            ),
            "tokenizer": tokenizer(
                {**TILE_TAGS, IMAGE: "<image>", 50: "<fake_token_around_image>", 51: "<global-img>"}
            ),
            "image_seq_len": 16,
        },
        "<image>",
        False,
    ),
    "idefics2": (
        lambda: {
            "image_processor": pil(
                "Idefics2ImageProcessor", size={"longest_edge": 32, "shortest_edge": 24}, do_image_splitting=True
            ),
            "tokenizer": tokenizer({IMAGE: "<image>", 50: "<fake_token_around_image>", 51: "<end_of_utterance>"}),
            "image_seq_len": 8,
        },
        "<image>",
        False,
    ),
    "smolvlm": (
        lambda: {
            "image_processor": pil(
                "SmolVLMImageProcessor", size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
            ),
            "tokenizer": tokenizer(
                {**TILE_TAGS, IMAGE: "<image>", 50: "<fake_token_around_image>", 51: "<global-img>"}
            ),
            "video_processor": video("SmolVLMVideoProcessor", size={"longest_edge": 32}),
            "image_seq_len": 16,
        },
        "<image>",
        True,
    ),
    "gemma3": (
        lambda: {
            "image_processor": pil(
                "Gemma3ImageProcessor", size=SIZE, do_pan_and_scan=True, pan_and_scan_min_crop_size=8
            ),
            "tokenizer": tokenizer(
                {IMAGE: "<image_soft_token>", 102: "<start_of_image>", 103: "<end_of_image>"},
                image_token="<image_soft_token>",
                boi_token="<start_of_image>",
                eoi_token="<end_of_image>",
            ),
            "image_seq_length": 16,
        },
        "<start_of_image>",
        False,
    ),
    "aya_vision": (
        lambda: {
            "image_processor": pil("GotOcr2ImageProcessor", size=SIZE, crop_to_patches=True, max_patches=3),
            "tokenizer": tokenizer(
                {IMAGE: "<|IMG_PATCH|>", 90: "<image>", 91: "TILE_GLOBAL", 92: "TILE_1", 93: "TILE_2"}
            ),
            "patch_size": 4,
            "img_size": 32,
            "downsample_factor": 2,
        },
        "<image>",
        False,
    ),
    "got_ocr2": (
        lambda: {
            "image_processor": pil("GotOcr2ImageProcessor", size={"height": 64, "width": 64}, crop_to_patches=True),
            "tokenizer": tokenizer({IMAGE: "<imgpad>", 91: "<img>", 92: "</img>"}),
        },
        "<img> <imgpad> </img>",
        False,
    ),
    "ovis2": (
        lambda: {
            "image_processor": pil("Ovis2ImageProcessor", size=SIZE, crop_to_patches=True, max_patches=3),
            "tokenizer": tokenizer(
                {
                    IMAGE: "<IMG_ATOM>",
                    90: "<image>",
                    111: "<IMG_START>",
                    112: "<IMG_GRID>",
                    113: "<IMG_COL>",
                    114: "<IMG_ROW>",
                    115: "<IMG_END>",
                }
            ),
            "image_seq_length": 16,
        },
        "<image>",
        False,
    ),
    "deepseek_vl": (
        lambda: {
            "image_processor": pil("DeepseekVLImageProcessor", size=SIZE, min_size=4),
            "tokenizer": tokenizer({IMAGE: "<image_placeholder>"}, image_token="<image_placeholder>"),
            "num_image_tokens": 64,
        },
        "<image_placeholder>",
        False,
    ),
    "mistral3": (
        lambda: {
            "image_processor": pil("PixtralImageProcessor", size={"longest_edge": 32}, patch_size=8),
            "tokenizer": tokenizer({IMAGE: "[IMG]", 11: "[IMG_BREAK]", 12: "[IMG_END]"}),
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        "[IMG]",
        True,
    ),
    "internvl": (
        lambda: {
            "image_processor": pil("GotOcr2ImageProcessor", size=SIZE, crop_to_patches=True, max_patches=3),
            "tokenizer": tokenizer(
                {IMAGE: "<IMG_CONTEXT>", 110: "<img>", 112: "</img>", 90: "<video>"},
                start_image_token="<img>",
                end_image_token="</img>",
                context_image_token="<IMG_CONTEXT>",
                video_token="<video>",
            ),
            "video_processor": video("InternVLVideoProcessor", size=SIZE),
            "image_seq_length": 16,
        },
        "<IMG_CONTEXT>",
        True,
    ),
    "cohere2_vision": (
        lambda: {
            "image_processor": pil(
                "Cohere2VisionImageProcessor", size=SIZE, max_patches=3, patch_size=4, downsample_factor=1
            ),
            "tokenizer": tokenizer(
                {IMAGE: "<|IMG_PATCH|>", 90: "<|B|>", 91: "<|E|>", 11: "<|L|>"},
                image_token="<|IMG_PATCH|>",
                boi_token="<|B|>",
                eoi_token="<|E|>",
                img_line_break_token="<|L|>",
            ),
        },
        "<|IMG_PATCH|>",
        True,
    ),
    "llava_onevision": (
        lambda: {
            "image_processor": pil("LlavaOnevisionImageProcessor", size=SIZE, image_grid_pinpoints=[*GRIDS, [96, 96]]),
            "tokenizer": tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
            "video_processor": video("LlavaOnevisionVideoProcessor", size=SIZE),
            "num_image_tokens": 64,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        },
        "<image>",
        True,
    ),
    "llava_next_video": (
        lambda: {
            "image_processor": pil(
                "LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=GRIDS
            ),
            "tokenizer": tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
            "video_processor": video("LlavaNextVideoVideoProcessor", size=SIZE, crop_size=SIZE),
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "<image>",
        True,
    ),
}
ROWS_OF = [name for name, (_, _, needs) in PROCESSORS.items() if HAS_TORCHVISION or not needs]
# Upstream makes arrays of PaliGemma's tensors in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
every_processor = pytest.mark.parametrize("name", ROWS_OF)


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(64, 40, 0), picture(30, 33, 1), picture(90, 30, 2)]


def classes(name):
    prefix = {"paligemma": "PaliGemma"}.get(name, modeling_prunesid.families.FAMILIES[name])
    ours = getattr(modeling_prunesid, f"PruneSID{prefix}Processor")
    return ours, next(base for base in ours.__mro__ if base.__module__.startswith("transformers.models."))


def make(name, cls, **settings):
    processor = cls(**PROCESSORS[name][0](), **settings)
    if name == "got_ocr2":  # no argument
        processor.num_image_tokens = 16
    return processor


def ask(name, processor, rows=((0, 1), (2,)), **kwargs):
    token = PROCESSORS[name][1]
    texts = ["word7 " + f"{token} word9 " * len(row) + "word11" for row in rows]
    images = [[PICTURES[index] for index in row] for row in rows]
    if name in ("got_ocr2",):  # takes pictures one behind the other
        images = [picture for row in images for picture in row]
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


def counts(inputs):
    return (inputs["input_ids"] == IMAGE).sum(1).tolist()


def words(inputs):
    """The prompts without placeholders and padding."""
    return [[int(token) for token in row if token not in (IMAGE, PAD)] for row in inputs["input_ids"]]


def build_model(name, budget):
    row = ROWS[name]
    torch.manual_seed(0)
    config = row.head.config_class(**row.config, prunesid_config={"budget": budget})
    return row.head(config).double().eval(), row


@every_processor
def test_without_a_budget_the_stock_prompt_is_written(name):
    ours, stock = classes(name)
    got, expected = ask(name, make(name, ours)), ask(name, make(name, stock))
    assert set(got) - set(expected) <= {"num_tiles"}
    assert all(torch.equal(torch.as_tensor(got[key]), torch.as_tensor(expected[key])) for key in expected)


@every_processor
@torch.no_grad()
def test_short_prompts_are_what_the_model_keeps(name):
    ours, _ = classes(name)
    full = ask(name, make(name, ours))
    for budget in (5, 0.25):
        short = ask(name, make(name, ours, num_visual_tokens=budget))
        assert words(short) == words(full)
        assert counts(short) < counts(full)
        model, row = build_model(name, budget)
        assert counts(short) == [int(short["num_visual_tokens"][:2].sum()), int(short["num_visual_tokens"][2:].sum())]
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
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@every_processor
def test_totals_of_an_image(name):
    ours, _ = classes(name)
    inputs = ask(name, make(name, ours, num_visual_tokens=7, budget_scope="image"))
    assert inputs["num_visual_tokens"].tolist() == [7, 7, 7]
    assert counts(inputs) == [14, 7]


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
    sizes = [(picture.height, picture.width) for picture in PICTURES]
    full = make(name, stock)._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    short = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    alone = ((0,), (1,), (2,))
    written = [counts(ask(name, each, alone)) for each in (make(name, ours), processor)]
    assert [before - after for before, after in zip(full, short)] == [
        before - after for before, after in zip(*written)
    ]
