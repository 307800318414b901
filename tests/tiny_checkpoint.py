"""A stock LLaVA checkpoint as a folder: tiny random weights, a processor of 100 words, generation config and card."""

from pathlib import Path

import numpy as np
from copies import remembered
from PIL import Image
from tiny import BOS, EOS, IMAGE, IMAGE_SIZE, PAD, PATCH_SIZE, build, stock_twin
from tiny_words import word_tokenizer
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, LlavaProcessor
from transformers.utils import is_torchvision_available

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CARD = "---\nlicense: llama2\npipeline_tag: image-text-to-text\n---\n# The base\n"


def build_processor() -> LlavaProcessor:
    names = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<unk>", IMAGE: "<image>", 118: "USER:", 119: "ASSISTANT:"}
    tokenizer = word_tokenizer(names, ["<image>"])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_class = CLIPImageProcessor if is_torchvision_available() else CLIPImageProcessorPil  # as upstream loads it
    return LlavaProcessor(
        image_class(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_checkpoint(folder: Path, **kwargs) -> Path:
    """Save a stock checkpoint; `kwargs` go to `save_pretrained` of the model."""
    stock = stock_twin(build())
    stock.generation_config.max_new_tokens = 6
    stock.save_pretrained(folder, **kwargs)
    build_processor().save_pretrained(folder)
    Path(folder, "README.md").write_text(CARD)
    return folder


@remembered
def load_variant(base) -> PruneSIDLlavaForConditionalGeneration:
    """The model of a checkpoint, which keeps 8 tokens."""
    return PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 8})


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE))
