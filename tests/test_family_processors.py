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


class SmallAria(transformers.AriaImageProcessorPil):
    """Aria's images are of 490 or 980 pixels a side."""

    def preprocess(self, *args, **kwargs):
        output = super().preprocess(*args, **kwargs)
        for name in ("pixel_values", "pixel_mask"):
            output[name] = output[name][..., :32, :32]
        return output


def minicpm_tokenizer():
    return tokenizer(
        {IMAGE: "<image_pad>", VIDEO: "<video_pad>", **{60 + i: f"<tag{i}>" for i in range(6)}},
        image_token="<image_pad>",
        video_token="<video_pad>",
        image_start_token="<tag0>",
        image_end_token="<tag1>",
        slice_start_token="<tag2>",
        slice_end_token="<tag3>",
        image_id_start_token="<tag4>",
        image_id_end_token="<tag5>",
    )


def gemma4_tokenizer():
    return tokenizer(
        {IMAGE: "<|image|>", VIDEO: "<|video|>", 102: "<|image>", 103: "<image|>", 104: "<audio>"},
        image_token="<|image|>",
        audio_token="<audio>",
        boa_token="<s>",
        eoa_token="</s>",
        boi_token="<|image>",
        eoi_token="<image|>",
    )


TILE_TAGS = {60 + 6 * row + col: f"<row_{row + 1}_col_{col + 1}>" for row in range(6) for col in range(6)}
GRIDS = [[32, 64], [64, 32], [64, 64]]
# Family: what makes its processor's parts, the text that stands for an image, the packages that it needs.
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
        (),
    ),
    "paligemma": (
        lambda: {
            "image_processor": pil("SiglipImageProcessor", size=SIZE, image_seq_length=64),
            "tokenizer": tokenizer({IMAGE: "<image>"}, image_token="<image>"),
        },
        "<image>",
        (),
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
        (),
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
        (),
    ),
    "smolvlm": (
        lambda: {
            "image_processor": pil(
                "SmolVLMImageProcessor", size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
            ),
            "tokenizer": tokenizer(
                {**TILE_TAGS, IMAGE: "<image>", 50: "<fake_token_around_image>", 51: "<global-img>"}
            ),
            "video_processor": video(
                "SmolVLMVideoProcessor", size={"longest_edge": 32}, max_image_size={"longest_edge": 32}
            ),
            "image_seq_len": 16,
        },
        "<image>",
        ("torchvision", "num2words"),
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
        (),
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
        (),
    ),
    "got_ocr2": (
        lambda: {
            "image_processor": pil("GotOcr2ImageProcessor", size={"height": 64, "width": 64}, crop_to_patches=True),
            "tokenizer": tokenizer({IMAGE: "<imgpad>", 91: "<img>", 92: "</img>"}),
        },
        "<img> <imgpad> </img>",
        (),
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
        (),
    ),
    "deepseek_vl": (
        lambda: {
            "image_processor": pil("DeepseekVLImageProcessor", size=SIZE, min_size=4),
            "tokenizer": tokenizer({IMAGE: "<image_placeholder>"}, image_token="<image_placeholder>"),
            "num_image_tokens": 64,
        },
        "<image_placeholder>",
        (),
    ),
    "mistral3": (
        lambda: {
            "image_processor": pil("PixtralImageProcessor", size={"longest_edge": 32}, patch_size=8),
            "tokenizer": tokenizer({IMAGE: "[IMG]", 11: "[IMG_BREAK]", 12: "[IMG_END]"}),
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        "[IMG]",
        ("torchvision",),
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
        ("torchvision",),
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
        ("torchvision",),
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
        ("torchvision",),
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
        ("torchvision",),
    ),
    "janus": (
        lambda: {
            "image_processor": pil("JanusImageProcessor", size=SIZE, min_size=4),
            "tokenizer": tokenizer(
                {IMAGE: "<image_placeholder>", 102: "<begin_of_image>", 103: "<end_of_image>"},
                image_token="<image_placeholder>",
                boi_token="<begin_of_image>",
                eoi_token="<end_of_image>",
            ),
            "num_image_tokens": 64,
        },
        "<image_placeholder>",
        (),
    ),
    "deepseek_vl_hybrid": (
        lambda: {
            "image_processor": pil(
                "DeepseekVLHybridImageProcessor",
                size=SIZE,
                high_res_size={"height": 128, "width": 128},
                min_size=4,
            ),
            "tokenizer": tokenizer({IMAGE: "<image_placeholder>"}, image_token="<image_placeholder>"),
            "num_image_tokens": 64,
        },
        "<image_placeholder>",
        (),
    ),
    "aria": (
        lambda: {
            "image_processor": SmallAria(max_image_size=490),
            "tokenizer": tokenizer({IMAGE: "<image>"}, image_token="<image>"),
            "size_conversion": {32: 24, 490: 24, 980: 24},
        },
        "<image>",
        (),
    ),
    "granite_docling": (
        lambda: {
            "image_processor": pil("GraniteDoclingImageProcessor", size=SIZE, max_patches=3),
            "tokenizer": tokenizer(
                {**TILE_TAGS, IMAGE: "<image>", 50: "<fake_token_around_image>", 51: "<global-img>"}
            ),
            "image_seq_len": 16,
        },
        "<image>",
        (),
    ),
    "mistral_large4": (
        lambda: {
            "image_processor": pil("PixtralImageProcessor", size={"longest_edge": 32}, patch_size=8),
            "tokenizer": tokenizer({IMAGE: "[IMG]", 11: "[IMG_BREAK]", 12: "[IMG_END]"}),
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        "[IMG]",
        ("torchvision",),
    ),
    "lighton_ocr": (
        lambda: {
            "image_processor": pil("PixtralImageProcessor", size={"longest_edge": 32}, patch_size=8),
            "tokenizer": tokenizer(
                {IMAGE: "<|image_pad|>", 11: "<|break|>", 12: "<|end|>"},
                image_token="<|image_pad|>",
                image_break_token="<|break|>",
                image_end_token="<|end|>",
            ),
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        "<|image_pad|>",
        ("torchvision",),
    ),
    "qianfan_ocr": (
        lambda: {
            "image_processor": pil("GotOcr2ImageProcessor", size=SIZE, crop_to_patches=True, max_patches=3),
            "tokenizer": tokenizer(
                {IMAGE: "<IMG_CONTEXT>", 110: "<img>", 112: "</img>", 90: "<image>"},
                start_image_token="<img>",
                end_image_token="</img>",
                context_image_token="<IMG_CONTEXT>",
            ),
            "image_seq_length": 16,
        },
        "<image>",
        (),
    ),
    "llama4": (
        lambda: {
            "image_processor": pil("Llama4ImageProcessor", size=SIZE, max_patches=3),
            "tokenizer": tokenizer(
                {
                    IMAGE: "<|patch|>",
                    90: "<|image|>",
                    102: "<|image_start|>",
                    103: "<|image_end|>",
                    104: "<|tile_x_separator|>",
                    105: "<|tile_y_separator|>",
                }
            ),
            "patch_size": 4,
        },
        "<|image|>",
        ("torchvision",),
    ),
    "lfm2_vl": (
        lambda: {
            "image_processor": pil(
                "Lfm2VlImageProcessor",
                size=SIZE,
                tile_size=32,
                encoder_patch_size=4,
                min_image_tokens=4,
                max_image_tokens=16,
                max_num_patches=64,
                max_pixels_tolerance=1.0,
                max_tiles=4,
                return_row_col_info=True,
            ),
            "tokenizer": tokenizer(
                {
                    **{
                        70 + 6 * row + col: f"<|img_row_{row + 1}_col_{col + 1}|>"
                        for row in range(4)
                        for col in range(4)
                    },
                    IMAGE: "<image>",
                    110: "<|image_start|>",
                    111: "<|image_end|>",
                    112: "<|img_thumbnail|>",
                }
            ),
        },
        "<image>",
        ("torchvision",),
    ),
    "step3p7": (
        lambda: {
            "image_processor": pil(
                "Step3p7ImageProcessor", size=SIZE, patch_size=32, max_image_size=96, vision_patch_size=4
            ),
            "tokenizer": tokenizer(
                {
                    IMAGE: "<im_patch>",
                    104: "<patch_start>",
                    105: "<patch_end>",
                    106: "<patch_newline>",
                    107: "<im_start>",
                    108: "<im_end>",
                }
            ),
        },
        "<im_patch>",
        ("torchvision",),
    ),
    "video_llama_3": (
        lambda: {
            "image_processor": pil(
                "VideoLlama3ImageProcessor",
                size={"shortest_edge": 64, "longest_edge": 1024},
                patch_size=4,
                merge_size=1,
            ),
            "tokenizer": tokenizer({IMAGE: "<image>", VIDEO: "<video>"}, image_token="<image>", video_token="<video>"),
            "video_processor": video(
                "VideoLlama3VideoProcessor", size={"shortest_edge": 64, "longest_edge": 4096}, patch_size=4
            ),
        },
        "<image>",
        ("torchvision",),
    ),
    "gemma4": (
        lambda: {
            "image_processor": pil("Gemma4ImageProcessor", patch_size=4, max_soft_tokens=70, pooling_kernel_size=2),
            "feature_extractor": transformers.Gemma4AudioFeatureExtractor(),
            "tokenizer": gemma4_tokenizer(),
            "video_processor": video("Gemma4VideoProcessor", patch_size=4, max_soft_tokens=70, pooling_kernel_size=2),
        },
        "<|image|>",
        ("torchvision",),
    ),
    "kimi_k25": (
        lambda: {
            "image_processor": pil(
                "Kimi_K25ImageProcessor", size={"max_height": 32, "max_width": 32}, patch_size=4, max_patches=64
            ),
            "tokenizer": tokenizer({IMAGE: "<image>", VIDEO: "<video>"}, image_token="<image>", video_token="<video>"),
            "video_processor": video("Kimi_K25VideoProcessor", patch_size=4),
        },
        "<image>",
        ("torchvision",),
    ),
    "molmo2": (
        lambda: {
            "image_processor": pil(
                "Molmo2ImageProcessor", size=SIZE, patch_size=4, max_crops=2, overlap_margins=[1, 1]
            ),
            "tokenizer": tokenizer(
                {
                    IMAGE: "<im_patch>",
                    90: "<|image|>",
                    91: "<|video|>",
                    110: "<low_res_im_start>",
                    111: "<im_start>",
                    112: "<im_end>",
                    113: "<frame_start>",
                    114: "<frame_end>",
                    115: "<im_col>",
                    116: "<im_low>",
                },
                image_token="<|image|>",
                video_token="<|video|>",
            ),
            "video_processor": video("Molmo2VideoProcessor", size=SIZE, patch_size=4),
        },
        "<|image|>",
        ("torchvision",),
    ),
    "minicpmv4_6": (
        lambda: {
            "image_processor": pil("MiniCPMV4_6ImageProcessor", patch_size=4, scale_resolution=32, max_slice_nums=4),
            "tokenizer": minicpm_tokenizer(),
            "video_processor": video("MiniCPMV4_6VideoProcessor", patch_size=4, scale_resolution=32),
        },
        "<image_pad>",
        ("torchvision",),
    ),
    "gemma3n": (
        lambda: {
            "image_processor": pil("SiglipImageProcessor", size={"height": 128, "width": 128}),
            "feature_extractor": transformers.Gemma3nAudioFeatureExtractor(),
            "tokenizer": tokenizer(
                {113: "<image_soft_token>", 110: "<start_of_image>", 112: "<end_of_image>", 117: "<audio_soft_token>"},
                image_token="<image_soft_token>",
                boi_token="<start_of_image>",
                eoi_token="<end_of_image>",
                audio_token="<audio_soft_token>",
                boa_token="<s>",
                eoa_token="</s>",
            ),
            "image_seq_length": 16,
        },
        "<image_soft_token>",
        ("timm", "torchvision"),
    ),
    "perception_lm": (
        lambda: {
            "image_processor": pil("PerceptionLMImageProcessor", tile_size=64, max_num_tiles=4),
            "tokenizer": tokenizer({IMAGE: "<image>", VIDEO: "<video>"}, image_token="<image>", video_token="<video>"),
            "video_processor": video("PerceptionLMVideoProcessor", size={"height": 64, "width": 64}),
            "patch_size": 16,
        },
        "<image>",
        ("timm", "torchvision"),
    ),
    "minicpm_ocr": (
        lambda: {
            "image_processor": transformers.MiniCPMOcrImageProcessor(
                patch_size=4, scale_resolution=32, max_slice_nums=4, downsample_mode="16x"
            ),
            "tokenizer": minicpm_tokenizer(),
            "video_processor": video(
                "MiniCPMOcrVideoProcessor", patch_size=4, scale_resolution=32, downsample_mode="16x"
            ),
        },
        "<image_pad>",
        ("torchvision",),
    ),
    "minicpmv4_7": (
        lambda: {
            "image_processor": pil("MiniCPMV4_6ImageProcessor", patch_size=4, scale_resolution=32, max_slice_nums=4),
            "tokenizer": minicpm_tokenizer(),
            "video_processor": video("MiniCPMV4_6VideoProcessor", patch_size=4, scale_resolution=32),
        },
        "<image_pad>",
        ("torchvision",),
    ),
    "gemma4_unified": (
        lambda: {
            "image_processor": transformers.Gemma4UnifiedImageProcessor(
                patch_size=4, max_soft_tokens=70, pooling_kernel_size=2
            ),
            "feature_extractor": transformers.Gemma4UnifiedAudioFeatureExtractor(),
            "tokenizer": gemma4_tokenizer(),
            "video_processor": video(
                "Gemma4UnifiedVideoProcessor", patch_size=4, max_soft_tokens=70, pooling_kernel_size=2
            ),
        },
        "<|image|>",
        ("torchvision",),
    ),
    "deepseek_ocr2": (
        lambda: {
            "image_processor": pil("DeepseekOcr2ImageProcessor", size={"height": 64, "width": 64}, tile_size=64),
            "tokenizer": tokenizer({IMAGE: "<image>"}),
            "patch_size": 4,
            "downsample_ratio": 1.4,  # of 64 pixels, the 12 x 12 tokens that the tower makes of them
        },
        "<image>",
        (),
    ),
    "unlimited_ocr": (
        lambda: {
            "image_processor": transformers.UnlimitedOcrImageProcessor(size={"height": 64, "width": 64}, tile_size=64),
            "tokenizer": tokenizer({IMAGE: "<image>"}),
            "patch_size": 4,
        },
        "<image>",
        ("torchvision",),
    ),
    "granite4_vision": (
        lambda: {
            "image_processor": pil(
                "LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=GRIDS
            ),
            "tokenizer": tokenizer({IMAGE: "<image>"}),
            "patch_size": 4,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "1/2",
        },
        "<image>",
        (),
    ),
    "pp_chart2table": (
        lambda: {
            "image_processor": pil("PPChart2TableImageProcessor", size={"height": 64, "width": 64}),
            "tokenizer": tokenizer({IMAGE: "<imgpad>", 110: "<img>", 112: "</img>"}),
        },
        "<img> " + "<imgpad>" * 16 + " </img>",
        (),
    ),
    "inkling_mm_model": (
        lambda: {
            "image_processor": transformers.InklingImageProcessor(),
            "feature_extractor": transformers.InklingFeatureExtractor(),
            "tokenizer": tokenizer({IMAGE: "<image>", 104: "<audio>", 105: "<image|>", 106: "<audio|>"}),
            "image_token": "<image>",
            "audio_token": "<audio>",
            "image_bos_token": "<image|>",
            "audio_bos_token": "<audio|>",
        },
        "<image>",
        ("torchvision",),
    ),
    **{
        name: (
            lambda: {
                "image_processor": transformers.Inkling2ImageProcessor(size={"height": 8, "width": 8}),
                "tokenizer": tokenizer({IMAGE: "<image>"}, image_token="<image>"),
            },
            "<image>",
            ("torchvision",),
        )
        for name in ("inkling2", "inkling2_loop")
    },
    "nemotron_h_omni": (
        lambda: {
            "image_processor": transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(
                patch_size=4, min_num_patches=16, max_num_patches=64
            ),
            "tokenizer": tokenizer({IMAGE: "<image>", VIDEO: "<video>", 110: "<img>", 112: "</img>"}),
            "video_processor": video(
                "NemotronH_Omni_Reasoning_V3VideoProcessor",
                patch_size=4,
                video_target_num_patches=64,
                norm_mean=[0.5] * 3,
                norm_std=[0.5] * 3,
            ),
            "feature_extractor": transformers.ParakeetFeatureExtractor(),
        },
        "<image>",
        ("torchvision",),
    ),
    "fast_vlm": (
        lambda: {
            "image_processor": pil("CLIPImageProcessor", size={"height": 128, "width": 128}, do_center_crop=False),
            "tokenizer": tokenizer({IMAGE: "<image>"}),
            "patch_size": 32,
            "vision_feature_select_strategy": "full",
        },
        "<image>",
        ("timm",),
    ),
}
ROWS_OF = [
    name
    for name, (_, _, needs) in PROCESSORS.items()
    if ROWS[name].is_installed and all(importlib.util.find_spec(package) for package in needs)
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
@torch.no_grad()
def test_short_prompts_are_what_the_model_keeps(name):
    ours, _ = classes(name)
    full = ask(name, make(name, ours))
    for budget in FEW_TOKENS.get(name, (5, 0.25)):
        short = ask(name, make(name, ours, num_visual_tokens=budget))
        assert words(name, short) == words(name, full)
        assert counts(name, short) < counts(name, full)
        model, row = build_model(name, budget)
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


@pytest.mark.parametrize("name", [name for name in ROWS_OF if name in VIDEO_TEXTS])
@torch.no_grad()
def test_short_prompts_of_images_and_videos_are_what_the_model_keeps(name):
    ours, stock = classes(name)
    full, expected = ask_of_videos(name, make(name, ours)), ask_of_videos(name, make(name, stock))
    assert all(torch.equal(torch.as_tensor(full[key]), torch.as_tensor(expected[key])) for key in expected)
    for budget in FEW_TOKENS.get(name, (5, 0.25)):
        short = ask_of_videos(name, make(name, ours, num_visual_tokens=budget))
        model, row = build_model(name, budget)
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
    model.video_pruning_rate = 0.5
    with pytest.raises(ValueError, match=r"video_pruning_rate=0.5 .* Pass video_pruning_rate=0"):
        model.get_video_features(**row.inputs([[0]]))
