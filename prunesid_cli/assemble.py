"""A small LLaVA from real pretrained parts (`parts.py`), saved as a PruneSID Hub folder.

DINOv2-S/14 (576 patches at 336 px), a LLaVA-1.5 projector and SmolLM2-135M-Instruct: 157 million weights in float32.
The projector is untrained (seeded), so the language model does not yet understand what the tower sees.

Examples:
    python -m prunesid_cli.assemble out/model
    python -m prunesid_cli.assemble out/model --budget 128
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil
from transformers.utils import logging

from modeling_prunesid import PruneSIDLlavaConfig, PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor
from prunesid_cli import parts


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image>\n' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def assemble(budget: int | float) -> tuple[PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor]:
    """The model that keeps `budget` of the 576 tokens of each image, and its processor."""
    tower = parts.vision_tower()
    language_model, tokenizer = parts.language_model()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    size, patch_size = tower.config.image_size, tower.config.patch_size
    config = PruneSIDLlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size // patch_size) ** 2,
        prunesid_config={"budget": budget},
    )
    torch.manual_seed(0)
    model = PruneSIDLlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = PruneSIDLlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        num_visual_tokens=budget,
    )
    return model.eval(), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the Hub folder (630 MB)")
    parser.add_argument("--budget", type=int, default=64, help="visual tokens kept (default: %(default)s)")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    model, processor = assemble(arguments.budget)
    model.save_pretrained(arguments.folder)
    processor.save_pretrained(arguments.folder)
    files = sorted(path.name for path in arguments.folder.iterdir())
    print(f"{arguments.folder} holds {', '.join(files)}")
    print(json.dumps({"folder": str(arguments.folder), "parameters": model.num_parameters(), "files": files}))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
