"""
Stock checkpoints of every declared family as folders: the tiny model of `families.py` and a processor that fits it,
with a chat template. Most of the processors need torchvision.
"""

import copy
from pathlib import Path

import torch
import transformers
from families import IMAGE, ROWS, VIDEO, VISION_END, VISION_START
from tiny_processors import PROCESSORS, SIZE, pil, tokenizer, video, with_names
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from modeling_prunesid import PruneSIDPPChart2TableProcessor
from modeling_prunesid.family import stock_class


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CLIP = {"size": {"shortest_edge": 32}, "crop_size": SIZE}
# Images of GOT-OCR 2.0 and its kin have 256 tokens, which no argument changes: too many for tiny models.
for cls in (transformers.GotOcr2Processor, PruneSIDPPChart2TableProcessor):
    cls.num_image_tokens = property(lambda self: 16, lambda self, value: None)
PIXELS = {"shortest_edge": 256, "longest_edge": 1024}
# What a family calls its image, its video, and what begins and ends an image; by default as Qwen-VL does.
WORDS = {
    "cohere_compass": ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"),
    "dots3_note": ("<|imgpad|>", "<|video_pad|>", "<|img|>", "<|endofimg|>"),
    "minimax_m3_vl": ("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
    "muse_glimmer": ("<|patch|>", "<|video|>", "<|image_start|>", "<|image_end|>"),
    "muse_spark": ("<|patch|>", "<|video|>", "<|image_start|>", "<|image_end|>"),
}
QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
NAMES = (
    ("image_token",),
    ("video_token",),
    ("vision_start_token", "image_start_token", "video_start_token", "vision_bos_token"),
    ("vision_end_token", "image_end_token", "video_end_token", "vision_eos_token"),
)
AUDIO, AUDIO_NAMES = "<|audio_comp_pad|>", ("audio_token", "audio_bos_token", "audio_eos_token")
# Families whose processors are of another one.
PARTS_OF = {
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm46v",
    "glmga": "glm46v",
    "qwen2_5_omni_thinker": "qwen2_vl",
    "qwen3_omni_moe_thinker": "qwen2_vl",
    "qwen3_vl_moe": "qwen3_vl",
}


def of_transformers(cls):
    """The class of Transformers that a class of ours extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


def grid_parts(name: str) -> dict:
    """The parts of a processor for images of any size."""
    words = dict(zip((IMAGE, VIDEO, VISION_START, VISION_END), WORDS.get(name, QWEN)))
    names = {own: word for group, word in zip(NAMES, words.values()) for own in group}
    like = PARTS_OF.get(name, name)
    attributes = of_transformers(ROWS[name].head._processor_class).get_attributes()
    is_glm = like.startswith("glm4")  # counts the pixels of two frames
    size = {edge: 2 * pixels if is_glm else pixels for edge, pixels in PIXELS.items()}
    grid: dict = {"patch_size": 4, "merge_size": 2, "size": size}
    if name == "dots3_note":
        grid["temporal_patch_size"] = 1
    classes = IMAGE_PROCESSOR_MAPPING_NAMES[like]
    parts = {
        "image_processor": pil(classes.get("pil", classes["torchvision"]).removesuffix("Pil"), **grid),
        "tokenizer": tokenizer({**words, 117: AUDIO}, **names, **dict.fromkeys(AUDIO_NAMES, AUDIO)),
    }
    if "video_processor" in attributes:
        own = {"draw_on_frames": False} if name == "ernie4_5_vl_moe" else {}  # needs a font
        videos = VIDEO_PROCESSOR_MAPPING_NAMES[like]  # a name alone before 5.24
        parts["video_processor"] = video(videos if isinstance(videos, str) else videos["torchvision"], **grid, **own)
    if "feature_extractor" in attributes:
        parts["feature_extractor"] = transformers.WhisperFeatureExtractor()
    return parts


def llava_parts(image_processor: str = "CLIPImageProcessor", **fields) -> dict:
    return {
        "image_processor": pil(image_processor, **CLIP, **fields),
        "tokenizer": tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }


def aria_parts() -> dict:
    """Of the smallest pixels that its processor knows."""
    parts = {**PROCESSORS["aria"][0](), "size_conversion": {490: 24, 980: 24}}
    return {**parts, "image_processor": pil("AriaImageProcessor", max_image_size=490)}


def gemma3_parts() -> dict:
    parts = PROCESSORS["gemma3"][0]()
    crops = {"pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
    return {**parts, "image_processor": pil("Gemma3ImageProcessor", size=SIZE, **crops)}


OTHERS = {
    "gemma3": gemma3_parts,
    "aria": aria_parts,
    "llava": llava_parts,
    "llava_next": lambda: llava_parts("LlavaNextImageProcessor", image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]),
    "video_llava": lambda: {
        **llava_parts("VideoLlavaImageProcessor"),
        "video_processor": video("VideoLlavaVideoProcessor", **CLIP),
    },
}


def processor_of(name: str):
    """The stock processor, with a chat template that writes its images."""
    own, _, start, end = WORDS.get(name, QWEN)
    make, image, _ = PROCESSORS.get(name, (lambda: grid_parts(name), f"{start}{own}{end}", ()))
    if name in OTHERS:
        make, image = OTHERS[name], image if name in PROCESSORS else "<image>"
    parts = make()
    parts["tokenizer"] = with_names(parts["tokenizer"])
    return of_transformers(ROWS[name].head._processor_class)(**parts, chat_template=TEMPLATE.replace("IMAGE", image))


def save(name: str, folder: Path) -> Path:
    """The stock checkpoint of a family, in float32."""
    row = ROWS[name]
    stock = stock_class(row.head)
    torch.manual_seed(0)
    config = copy.deepcopy(row.config)
    if name == "aria":
        config["vision_config"] |= {"image_size": 490, "patch_size": 70}
        config["projector_patch_to_query_dict"] = {49: 24, 196: 24}
    model = stock(of_transformers(row.head.config_class)(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all() or (parameter.dim() > 1 and parameter.std() == 0):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        head = (model.get_output_embeddings() or model.language_model.lm_head).weight
        head[:4], head[90:] = 0, 0  # no answer holds a placeholder, tag or end
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor_of(name).save_pretrained(folder)
    return folder
