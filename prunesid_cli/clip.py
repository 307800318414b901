"""PruneSID on a clip: what `prunesid demo --video FILE` does with Video-LLaVA.

The frames are decoded with PyAV and sampled as upstream does: 8 of them, evenly spaced. Without `--model`, the parts
of the assembled LLaVA make a Video-LLaVA (untrained projector: its answers do not describe the clip). Compared are the
stock class, a budget for each frame (the paper: 17 of 256, so 136 of 2,048) and the same total for the whole clip,
shared over the frames by what each shows that the one before does not.

Examples:
    prunesid demo --video clip.mp4
    prunesid demo --video clip.mp4 --budgets 17 8 --model LanguageBind/Video-LLaVA-7B-hf
"""

import statistics
from functools import partial
from pathlib import Path

import torch
import transformers
from matplotlib import pyplot
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from modeling_prunesid import PruneSIDVideoLlavaConfig, PruneSIDVideoLlavaForConditionalGeneration
from prunesid_cli import clip_frames
from prunesid_cli.demo_steps import ROUNDS, answer, load_assembled
from prunesid_cli.measuring import seconds_interleaved
from prunesid_cli.tables import print_rows


FRAME_SIZE = 224


def read_frames(path: str | Path, count: int = clip_frames.NUM_FRAMES) -> list[Image.Image]:
    """`count` evenly spaced frames of a video file, from its first one on; all of them if it has fewer.

    Raises:
        `ValueError`: if the file cannot be read, or has no video in it.
    """
    try:
        return clip_frames.read_frames(path, count)
    except ValueError as error:
        raise ValueError(f"--video must be a video file that PyAV can decode, got {str(path)!r}: {error}") from error


def from_parts(model, processor):
    """A Video-LLaVA around the modules of a LLaVA, whose tower becomes that of images and of frames."""
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = PruneSIDVideoLlavaConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_index=model.config.image_token_id,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    video_model = _around_modules(PruneSIDVideoLlavaForConditionalGeneration, config, model, model.model.vision_tower)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "<video>\n{prompt}"}]}], add_generation_prompt=True
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": FRAME_SIZE},
        crop_size={"height": FRAME_SIZE, "width": FRAME_SIZE},
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
    )
    return video_model, tokenizer, images, text


def from_checkpoint(name: str):
    """A stock Video-LLaVA checkpoint in our class, on the GPU if there is one."""
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type != "video_llava":
        raise ValueError(f"--model must be a Video-LLaVA checkpoint with --video, got {model_type!r} in {name}.")
    device_map = "auto" if torch.cuda.is_available() else None
    model = PruneSIDVideoLlavaForConditionalGeneration.from_pretrained(name, dtype="auto", device_map=device_map)
    images = CLIPImageProcessorPil.from_pretrained(name)
    return model, AutoTokenizer.from_pretrained(name), images, "USER: <video>\n{prompt} ASSISTANT:"


def _around_modules(model_class, config, model, tower):
    """A model that shares the modules of `model`; `tower`, if not None, takes the place of both towers."""
    with torch.device("meta"):
        built = model_class(config)
    for name in ("image_tower", "video_tower"):
        setattr(built.model, name, tower if tower is not None else getattr(model.model, name))
    for name in ("multi_modal_projector", "language_model"):
        setattr(built.model, name, getattr(model.model, name))
    built.lm_head, built.generation_config = model.lm_head, model.generation_config
    return built.eval()


def reference_model(model) -> VideoLlavaForConditionalGeneration:
    """The stock class around the very modules of `model`: the same weights, held once."""
    settings = model.config.to_dict()
    for name in ("model_type", "prunesid_config", "architectures", "auto_map"):
        settings.pop(name, None)
    return _around_modules(VideoLlavaForConditionalGeneration, VideoLlavaConfig(**settings), model, None)


def ask(model, tokenizer, images, text: str, frames: list[Image.Image], prompt: str) -> dict:
    """The inputs for a question about a clip, with a placeholder for the CLS token and every patch of each frame."""
    pixels = images(frames, return_tensors="pt")["pixel_values"][None].to(model.device, model.dtype)
    patch_size = model.config.vision_config.patch_size
    tokens = len(frames) * (1 + (pixels.shape[-2] // patch_size) * (pixels.shape[-1] // patch_size))
    text = text.replace("{prompt}", prompt).replace("<video>", "<video>" * tokens)
    return {**tokenizer(text, return_tensors="pt").to(model.device), "pixel_values_videos": pixels}


def cases_of(budgets: list, num_frames: int) -> dict[str, dict]:
    """The settings of the rows: each budget for a frame, and the same total for the clip."""
    cases = {}
    for budget in budgets:
        total = budget * num_frames if isinstance(budget, int) else budget
        cases[f"{budget} a frame"] = {"budget": budget}
        cases[f"{total} a clip"] = {"budget": total, "budget_scope": "image", "dynamic": True}
    return cases


def measure(model, inputs: dict, cases: dict[str, dict]) -> list[dict]:
    """One row for the stock class, one for ours with compression off, and one for each of `cases`."""
    off = {"budget": None}
    candidates = {"stock class": (reference_model(model), off), "PruneSID off": (model, off)}
    candidates |= {name: (model, settings) for name, settings in cases.items()}

    def first_token(candidate, settings):
        model.config.prunesid_config = settings
        candidate.generate(**inputs, max_new_tokens=1, do_sample=False)

    runs = {name: partial(first_token, *candidate) for name, candidate in candidates.items()}
    seconds = seconds_interleaved(runs, ROUNDS)

    rows = []
    for name, (candidate, settings) in candidates.items():
        model.config.prunesid_config = settings
        is_kept = kept_tokens(candidate, inputs["pixel_values_videos"])
        median = statistics.median(seconds[name])
        rows.append(
            {
                "case": name,
                "visual_tokens": int(is_kept.sum()),
                "tokens_of_frames": is_kept.sum(1).tolist(),
                "first_token_ms": 1000 * median,
                "speedup": statistics.median(seconds["stock class"]) / median,
            }
        )
    return rows


@torch.no_grad()
def kept_tokens(model, pixels: torch.Tensor) -> torch.Tensor:
    """Which tokens of each frame are kept, `(num_frames, 1 + patches)`: first the CLS token, then the patches."""
    tokens = 1 + (pixels.shape[-1] // model.config.vision_config.patch_size) ** 2
    output = model.model.get_video_features(pixel_values_videos=pixels)
    if "keep_indices" not in output:
        return torch.ones(pixels.shape[1], tokens, dtype=torch.bool)
    is_kept = torch.zeros(pixels.shape[1] * tokens, dtype=torch.bool)
    is_kept[output["keep_indices"][0].cpu()] = True
    return is_kept.view(-1, tokens)


def columns(row: dict) -> dict[str, str]:
    """What the table shows of a row of `measure`."""
    return {
        "": row["case"],
        "visual tokens": str(row["visual_tokens"]),
        "first token": f"{row['first_token_ms']:.0f} ms",
        "speed-up": f"{row['speedup']:.2f}x",
        "tokens of each frame": " ".join(map(str, row["tokens_of_frames"])),
    }


def draw(path: Path, frames: torch.Tensor, selections: dict[str, torch.Tensor]) -> None:
    """A row for each selection of `kept_tokens`: the frames `(num_frames, 3, height, width)`, bright where kept."""
    num_frames, _, height, width = frames.shape
    figure, grid = pyplot.subplots(
        len(selections), num_frames, figsize=(1.7 * num_frames, 1.95 * len(selections)), squeeze=False, dpi=130
    )
    for axes, (name, is_kept) in zip(grid, selections.items()):
        side = round((is_kept.shape[1] - 1) ** 0.5)
        bright = torch.nn.functional.interpolate(
            is_kept[:, None, 1:].float().unflatten(2, (side, side)), (height, width)
        )
        for axis, frame, mask, kept in zip(axes, frames, bright, is_kept):
            axis.imshow((frame * (0.25 + 0.75 * mask)).permute(1, 2, 0).numpy())
            axis.set_title(f"{int(kept.sum())} tokens", fontsize=9)
            axis.set_axis_off()
        axes[0].set_title(f"{name}: {int(is_kept[0].sum())}", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path)
    pyplot.close(figure)


def run(arguments) -> dict:
    """`prunesid demo --video`: prints the table, draws the frames, and returns the report."""
    frames = read_frames(arguments.video)
    if arguments.model:
        model, tokenizer, images, text = from_checkpoint(arguments.model)
    else:
        model, tokenizer, images, text = from_parts(*load_assembled(arguments.output / "model"))
    inputs = ask(model, tokenizer, images, text, frames, arguments.prompt)
    cases = cases_of(arguments.budgets or [17], len(frames))
    rows = measure(model, inputs, cases)
    print()
    print_rows([columns(row) for row in rows], left=("tokens of each frame",))
    if not arguments.model:
        print("\nThe projector is untrained, so the answers show that generation runs, not what is in the clip.")
    selections, answers = {}, []
    for name, settings in cases.items():
        model.config.prunesid_config = settings
        selections[name] = kept_tokens(model, inputs["pixel_values_videos"])
        answers.append({"": name, "answer": answer(model, tokenizer, inputs)[0]})
    print()
    print_rows(answers, left=("answer",))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
    shown = (inputs["pixel_values_videos"][0].float().cpu() * deviation + mean).clamp(0, 1)
    figure = arguments.output / "kept_patches_of_frames.png"
    draw(figure, shown, selections)
    print(f"\nThe kept patches of {len(frames)} frames: {figure}")
    return {
        "model": arguments.model or "assembled",
        "video": str(arguments.video),
        "device": str(model.device),
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": ROUNDS,
        "rows": rows,
        "figure": str(figure),
    }
