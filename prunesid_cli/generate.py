"""Answer a question about an image, or the rows of a JSONL file, with fewer visual tokens.

The model is a stock checkpoint of a supported family, or a variant. With --compare the stock model answers as well.

A row is a JSON object with an `image` (path or URL) or `images`, and a `prompt`; or with `messages`, a conversation as
chat templates take it. It may have an `id`. Answers are lines `{"row": 0, "id": ..., "answer": ...}` in the order of
the rows; a row that cannot be read or answered has an `error` in place of the answer. After an interruption, the same
command continues. `torchrun` and `accelerate launch` split the rows between processes, also on several machines with a
shared folder: each process answers every n-th row.

Examples:
    prunesid generate llava-hf/llava-1.5-7b-hf --image cats.jpg --prompt "What are the cats doing?" --budget 64
    prunesid generate out/llava-64 --image cats.jpg --prompt "What are the cats doing?" --compare
    prunesid generate rows.jsonl --output answers.jsonl --model llava-hf/llava-1.5-7b-hf --budget 64
    torchrun --nproc-per-node 8 -m prunesid_cli generate rows.jsonl --output answers.jsonl --model out/llava-64
    accelerate launch -m prunesid_cli generate rows.jsonl --output answers.jsonl --model out/llava-64
"""

import argparse
import inspect
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.utils import logging

from modeling_prunesid import ViTCoPLlavaForConditionalGeneration
from modeling_prunesid.family import stock_class
from modeling_prunesid.presets import check_model_type, read_preset
from prunesid_cli.batch import Output, Request, Shard, answer_rows, describe
from prunesid_cli.convert import find_family, parse_budget
from prunesid_cli.images import open_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="MODEL|ROWS.jsonl",
        help="stock checkpoint or variant (a folder, or a name on the Hub), or rows",
    )
    parser.add_argument("--image", help="path or URL")
    parser.add_argument(
        "--prompt",
        default="What is shown in this image?",
        help="also for rows without one (default: %(default)s)",
    )
    parser.add_argument("--budget", type=parse_budget, help="tokens to keep of each view, or their share as in 0.1")
    parser.add_argument("--preset", help="a name of `prunesid presets`, or a JSON file")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--compare", action="store_true", help="also answer without pruning")
    rows = parser.add_argument_group("rows of a JSONL file")
    rows.add_argument("--output", type=Path, help="file for the answers; those of unfinished jobs are in OUTPUT.parts")
    rows.add_argument("--model", help="model for the rows (default: the embedded model)")
    rows.add_argument("--batch-size", type=int, default=1, help="rows answered at once (default: %(default)s)")
    rows.add_argument("--merge", action="store_true", help="only write the existing answers to OUTPUT")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    logging.disable_progress_bar()
    if arguments.input.endswith(".jsonl") or arguments.output is not None:
        return run_rows(arguments)
    if arguments.image is None or arguments.model is not None or arguments.merge:
        raise ValueError(
            "A model needs --image, and rows need a file that ends with .jsonl and --output: `prunesid generate MODEL "
            "--image PICTURE` or `prunesid generate ROWS.jsonl --output ANSWERS.jsonl --model MODEL`."
        )
    image = open_image(arguments.image)
    model, processor = load(arguments.input, arguments.preset, arguments.budget, "auto")
    inputs = ask(processor, image, arguments.prompt).to(model.device, model.dtype)
    budgets = [model.config.prunesid_config.budget, *([None] if arguments.compare else [])]
    answers = [answer(model, processor, inputs, budget, arguments.max_new_tokens) for budget in budgets]
    for found in answers:
        print(f"{found['visual_tokens']:5} visual tokens, {found['seconds']:6.2f} s: {found['answer']}")
    return {"model": arguments.input, "class": type(model).__name__, "answers": answers}


def run_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer the rows of this process; see [`answer_rows`]."""
    source = Path(arguments.input)
    if arguments.output is None or arguments.image is not None or arguments.compare:
        raise ValueError(f"The rows of {source} need --output, and take neither --image nor --compare.")
    output = Output(arguments.output)
    if arguments.merge:
        return output.merge(output.job()["rows"])
    for name in ("batch_size", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}.")
    shard, (num_rows, digest) = Shard.of_environment(), describe(source)
    job = {"rows": num_rows, "input": digest, "model": "embedded" if arguments.model is None else arguments.model}
    job |= {name: getattr(arguments, name) for name in ("prompt", "preset", "budget", "max_new_tokens")}

    def load_answerer():
        name = arguments.model
        if name is None:
            from prunesid_cli.embedded import complete

            name = str(complete())
        model, processor = load(name, arguments.preset, arguments.budget, device_map_of(shard))
        processor.tokenizer.padding_side = "left"
        return lambda requests: answer_requests(model, processor, requests, arguments.max_new_tokens)

    found = answer_rows(source, output, job, shard, load_answerer, arguments.batch_size)
    return {"output": str(arguments.output), **found}


def without_ours(model: Any, inputs: Any) -> Any:
    """`inputs` of `model`, which is of our class, as its stock class takes them: without what ours takes besides."""
    takes = inspect.signature(stock_class(type(model.model)).forward).parameters
    ours = [name for name in model.model.own_arguments if name not in takes]
    return type(inputs)({name: value for name, value in inputs.items() if name not in ours})


def device_map_of(shard: Shard) -> str | dict[str, str]:
    """Everything that one process finds; an accelerator of its own for each of several."""
    if shard.count == 1:
        return "auto"
    if not torch.accelerator.is_available():
        return {"": "cpu"}
    kind = torch.accelerator.current_accelerator().type
    return {"": f"{kind}:{shard.local_rank % torch.accelerator.device_count()}"}


def answer_requests(model, processor, requests: list[Request], max_new_tokens: int) -> list[str]:
    """
    The greedy answers.

    Raises:
        `ValueError`: if a conversation or an image does not fit the model, or the memory of the device.
    """
    return answer_inputs(model, processor, write_requests(processor, requests), max_new_tokens)


def write_requests(processor, requests: list[Request]) -> Any:
    """
    The inputs of a model for conversations.

    Raises:
        `ValueError`: if the processor does not take one.
    """
    try:
        return processor.apply_chat_template(
            [request.messages for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    except Exception as error:  # whatever a chat template or an image processor raises
        raise ValueError(f"The processor does not take the row: {error or type(error).__name__}") from error


def answer_inputs(model, processor, inputs: Any, max_new_tokens: int) -> list[str]:
    """
    The greedy answers to inputs of `write_requests`.

    Raises:
        `ValueError`: if they do not fit the model, or the memory of the device.
    """
    try:
        output = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=max_new_tokens, do_sample=False)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"The row does not fit the memory: {error}") from error
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def load(name: str, preset: str | None, budget: int | float | None, device_map: str | dict[str, str]) -> tuple:
    """The model of a checkpoint with a preset or a budget, and its processor, which writes full prompts."""
    method, settings = None, {}
    if preset is not None:
        settings, method, _ = read_preset(preset)
    if budget is not None:
        settings["budget"] = budget
    model_class = find_family(name, method=method)
    if preset is not None:
        check_model_type(preset, model_class.config_class.model_type)
    field = "vitcop_config" if model_class is ViTCoPLlavaForConditionalGeneration else "prunesid_config"
    model = model_class.from_pretrained(
        name, dtype="auto", device_map=device_map, **({field: settings} if settings else {})
    )
    processor = load_processor(name, model)
    if hasattr(processor, "num_visual_tokens"):
        processor.num_visual_tokens = None  # full prompts, which any budget accepts
    return model.eval(), processor


# For processors without a chat template, such as PaliGemma's: images as their placeholders, then the words.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] != 'text' -%}TOKEN{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}"
)


def load_processor(name: str, model: Any, **arguments):
    """The processor of a checkpoint, ours where the model has one, with a chat template in any case."""
    processor_class = getattr(model, "_processor_class", None)
    if hasattr(processor_class, "arguments_for"):
        own = processor_class.arguments_for(model.config.prunesid_config)
        arguments |= {field: own[field] for field in ("question",) if field in own}
        processor = processor_class.from_pretrained(name, **arguments)
    else:
        processor = AutoProcessor.from_pretrained(name, **arguments)
    if getattr(processor, "chat_template", None) is None and hasattr(processor, "image_token"):
        processor.chat_template = PLAIN_TEMPLATE.replace("TOKEN", processor.image_token)
    return processor


def ask(processor, image, prompt: str):
    """The inputs for a question about an image, by the checkpoint's chat template."""
    return ask_about(processor, {"type": "image", "image": image}, prompt)


def ask_about(processor, part: dict, prompt: str, **arguments):
    """The same for a picture or clip as a `part` of a message."""
    return processor.apply_chat_template(
        [{"role": "user", "content": [part, {"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **arguments,
    )


def answer(model, processor, inputs, budget: int | float | None, max_new_tokens: int) -> dict[str, Any]:
    """The greedy answer with a budget, how many visual tokens the language model read, and the seconds it took."""
    model.config.prunesid_config.budget = budget
    lengths: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
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
