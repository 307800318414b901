"""Stock processors that fit the tiny models of `families.py`."""

import transformers
from families import BOS, EOS, IMAGE, PAD, VIDEO
from tiny_words import word_tokenizer


SIZE = {"height": 32, "width": 32}


def tokenizer(specials, **names):
    """Words 0 to 119, some of them by other names; `names` are attributes as upstream's tokenizers have them."""
    words = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<unk>", **specials}
    made = word_tokenizer(words, specials.values())
    for name, word in names.items():
        setattr(made, name, word)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(word))
    return made


def with_names(made):
    """A tokenizer whose named tokens are saved with it."""
    names = {
        name: value
        for name, value in vars(made).items()
        if name.endswith("_token") and isinstance(value, str) and not name.startswith("_")
    }
    return type(made)(
        tokenizer_object=made.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )


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


def idefics_tokenizer():
    return tokenizer({**TILE_TAGS, IMAGE: "<image>", 50: "<fake_token_around_image>", 51: "<global-img>"})


def image_and_video_tokenizer():
    return tokenizer({IMAGE: "<image>", VIDEO: "<video>"}, image_token="<image>", video_token="<video>")


def internvl_tokenizer(specials, **names):
    """With what begins and ends an image."""
    specials = {IMAGE: "<IMG_CONTEXT>", 110: "<img>", 112: "</img>", **specials}
    given = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return tokenizer(specials, **given, **names)


def pixtral_parts(token, row_end, end, **names):
    return {
        "image_processor": pil("PixtralImageProcessor", size={"longest_edge": 32}, patch_size=8),
        "tokenizer": tokenizer({IMAGE: token, 11: row_end, 12: end}, **names),
        "patch_size": 4,
        "spatial_merge_size": 2,
    }


def llava_next_images():
    grids = {"image_grid_pinpoints": GRIDS}
    return pil("LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SIZE, **grids)


def tiles_of_images():
    return pil("GotOcr2ImageProcessor", size=SIZE, crop_to_patches=True, max_patches=3)


GRIDS = [[32, 64], [64, 32], [64, 64]]


# Family: what makes its processor's parts, the text that stands for an image, the packages that it needs.
# The first release whose processor makes inputs that can be compared, and whose stock class takes videos.
SINCE_OF_VIDEOS = {"kimi_k25": "5.24.0"}
SINCE = {
    "deepseek_ocr2": "5.23.0",  # before, it writes its text by itself: full prompts
    "minicpmv4_6": "5.19.0",  # before, the stock model raises on images of these sizes
    "nemotron_h_omni": "5.24.0",  # before, its feature extractor needs librosa
}
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
            "tokenizer": idefics_tokenizer(),
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
            "tokenizer": idefics_tokenizer(),
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
            "image_processor": tiles_of_images(),
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
    **dict.fromkeys(
        ("mistral3", "mistral_large4"),
        (lambda: pixtral_parts("[IMG]", "[IMG_BREAK]", "[IMG_END]"), "[IMG]", ("torchvision",)),
    ),
    "internvl": (
        lambda: {
            "image_processor": tiles_of_images(),
            "tokenizer": internvl_tokenizer({90: "<video>"}, video_token="<video>"),
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
            "image_processor": llava_next_images(),
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
            "tokenizer": idefics_tokenizer(),
            "image_seq_len": 16,
        },
        "<image>",
        (),
    ),
    "lighton_ocr": (
        lambda: pixtral_parts(
            "<|image_pad|>",
            "<|break|>",
            "<|end|>",
            image_token="<|image_pad|>",
            image_break_token="<|break|>",
            image_end_token="<|end|>",
        ),
        "<|image_pad|>",
        ("torchvision",),
    ),
    "qianfan_ocr": (
        lambda: {
            "image_processor": tiles_of_images(),
            "tokenizer": internvl_tokenizer({90: "<image>"}),
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
            "tokenizer": image_and_video_tokenizer(),
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
            "tokenizer": image_and_video_tokenizer(),
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
    **dict.fromkeys(
        ("minicpmv4_6", "minicpmv4_7"),
        (
            lambda: {
                "image_processor": pil(
                    "MiniCPMV4_6ImageProcessor", patch_size=4, scale_resolution=32, max_slice_nums=4
                ),
                "tokenizer": minicpm_tokenizer(),
                "video_processor": video("MiniCPMV4_6VideoProcessor", patch_size=4, scale_resolution=32),
            },
            "<image_pad>",
            ("torchvision",),
        ),
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
            "tokenizer": image_and_video_tokenizer(),
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
            "image_processor": llava_next_images(),
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
