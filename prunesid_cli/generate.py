"""Answer a question about an image, with fewer visual tokens.

The model is a stock checkpoint of a supported family, or a variant. With --compare the stock model answers as well.

Examples:
    prunesid generate llava-hf/llava-1.5-7b-hf --image cats.jpg --prompt "What are the cats doing?" --budget 64
    prunesid generate out/llava-64 --image cats.jpg --prompt "What are the cats doing?" --compare
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.utils import logging

from modeling_prunesid import ViTCoPLlavaForConditionalGeneration
from modeling_prunesid.presets import check_model_type, read_preset
from prunesid_cli.convert import find_family, parse_budget
from prunesid_cli.images import open_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="stock checkpoint or variant: a folder, or a name on the Hub")
    parser.add_argument("--image", required=True, help="path or URL")
    parser.add_argument("--prompt", default="What is shown in this image?", help="the question (default: %(default)s)")
    parser.add_argument("--budget", type=parse_budget, help="visual tokens kept of each view, or their share")
    parser.add_argument("--preset", help="a name of `prunesid presets`, or a JSON file")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--compare", action="store_true", help="also answer without pruning")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    logging.disable_progress_bar()
    image = open_image(arguments.image)
    method, settings = None, {}
    if arguments.preset is not None:
        settings, method, _ = read_preset(arguments.preset)
    if arguments.budget is not None:
        settings["budget"] = arguments.budget
    model_class = find_family(arguments.model, method=method)
    if arguments.preset is not None:
        check_model_type(arguments.preset, model_class.config_class.model_type)
    name = "vitcop_config" if model_class is ViTCoPLlavaForConditionalGeneration else "prunesid_config"
    model = model_class.from_pretrained(
        arguments.model, dtype="auto", device_map="auto", **({name: settings} if settings else {})
    )
    processor = AutoProcessor.from_pretrained(arguments.model)
    if hasattr(processor, "num_visual_tokens"):
        processor.num_visual_tokens = None  # full prompts, which any budget accepts
    inputs = ask(processor, image, arguments.prompt).to(model.device, model.dtype)
    budgets = [model.config.prunesid_config.budget, *([None] if arguments.compare else [])]
    answers = [answer(model, processor, inputs, budget, arguments.max_new_tokens) for budget in budgets]
    for found in answers:
        print(f"{found['visual_tokens']:5} visual tokens, {found['seconds']:6.2f} s: {found['answer']}")
    return {"model": arguments.model, "class": model_class.__name__, "answers": answers}


def ask(processor, image, prompt: str):
    """The inputs for a question about an image, by the checkpoint's chat template."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def answer(model, processor, inputs, budget: int | float | None, max_new_tokens: int) -> dict[str, Any]:
    """The greedy answer with a budget, how many visual tokens the language model read, and the seconds it took."""
    model.config.prunesid_config.budget = budget
    lengths: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    hook.remove()
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    return {
        "visual_tokens": lengths[0] - inputs["input_ids"].shape[1] + placeholders,
        "seconds": round(time.perf_counter() - start, 3),
        "answer": processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(),
    }
