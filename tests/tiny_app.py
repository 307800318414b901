"""
Stock checkpoints of families with images of any size, tiles and clips, as folders with a processor each: for the page
of `prunesid app`. Processors of clips need torchvision, so that this runs where `torchvision_shim` has added it.
"""

from pathlib import Path

import torch
import transformers
from tiny import TEXT, VISION
from tiny_qwen import fields
from tokenizers import Tokenizer, models, pre_tokenizers


SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<vision_start>", "<vision_end>", "<img>", "</img>",
    "<image_context>",
)  # fmt: skip
WORDS = ("what", "is", "it", "in", "the", "picture", "clip", "does", "move", "there", "User:", "Assistant:", "Frame1:")
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *WORDS, *(f"word{i}" for i in range(60))))}
TEMPLATE = (
    "{% for message in messages %}User: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE {% elif part.type == 'video' %}VIDEO {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIDE, PATCH = 28, 4
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def tokenizer(**tokens):
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]), **({"extra_special_tokens": tokens} if tokens else {}),
    )  # fmt: skip


def template(image, video):
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def of_video_llava():
    config = transformers.VideoLlavaConfig(
        vision_config=VISION,
        text_config={**TEXT, "max_position_embeddings": 4096},
        image_token_index=VOCABULARY["<image>"],
        video_token_index=VOCABULARY["<video>"],
    )
    processor = transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**CROPPED),
        video_processor=transformers.VideoLlavaVideoProcessor(**CROPPED),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )
    return transformers.VideoLlavaForConditionalGeneration(config), processor


def of_qwen2_5_vl():
    own = fields("Qwen2_5_VL") | {"vision_start_token_id": VOCABULARY["<vision_start>"]}
    own |= {"image_token_id": VOCABULARY["<image>"], "video_token_id": VOCABULARY["<video>"]}
    own |= {"vision_end_token_id": VOCABULARY["<vision_end>"]}
    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    sizes |= {"size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}}
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer(image_token="<image>", video_token="<video>"),
        transformers.Qwen2VLVideoProcessor(**sizes),
        chat_template=template("<vision_start> <image> <vision_end>", "<vision_start> <video> <vision_end>"),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**own)), processor


def of_internvl():
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": [32, 32], "patch_size": [4, 4],
        },
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=VOCABULARY["<image_context>"],
        image_seq_length=16,
        downsample_ratio=0.5,
    )  # fmt: skip
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image_context>"}
    size = {"height": 32, "width": 32}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer(**names, video_token="<video>"),
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=template("<image_context>", "<video>"),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


FAMILIES = {"video_llava": of_video_llava, "qwen2_5_vl": of_qwen2_5_vl, "internvl": of_internvl}


def save(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
