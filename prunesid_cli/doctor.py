"""What is installed, what works on this machine, and what to fix; or what a repo asks you to trust.

A tiny random LLaVA answers on each device, with fewer tokens and without pruning; nothing is fetched. With REPO, its
Python files are compared with those that this package writes for its settings, and none of them runs.

Examples:
    prunesid doctor
    prunesid doctor ORG/NAME
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import LlavaForConditionalGeneration

import modeling_prunesid
from modeling_prunesid import PruneSIDLlavaConfig, PruneSIDLlavaForConditionalGeneration, compress
from prunesid_cli import embedded_folder
from prunesid_cli.repo_check import check_repo
from prunesid_cli.tables import print_rows


NEWEST_TESTED = "5.24"
# extra: the packages whose modules its commands import
EXTRAS = {
    "app": ("av", "gradio", "onnx"),
    "demo": ("av", "gguf", "matplotlib", "onnx", "skimage", "sklearn"),
    "docs": ("mkdocs", "material", "mkdocstrings_handlers"),
    "lmms-eval": ("decord", "lmms_eval"),
    "test": ("cloudpickle", "datasets", "peft", "pytest"),
    "train": ("peft",),
}
PACKAGES = ("torch", "transformers", "accelerate", "huggingface-hub", "safetensors", "numpy", "pillow", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", nargs="?", help="check the code of this repo on the Hub, or of this folder")
    parser.add_argument("--revision", help="of the repo")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.repo is not None:
        return _check_repo(arguments.repo, arguments.revision)
    versions = {"python": platform.python_version(), "prunesid-transformers": modeling_prunesid.__version__}
    versions |= {name: found for name in PACKAGES if (found := _version_of(name)) is not None}
    works, problems = {}, []
    if Version(transformers.__version__).release[:2] > Version(NEWEST_TESTED).release:
        problems.append(
            f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, the newest that was tested. If "
            f"something fails, install 'transformers<={NEWEST_TESTED}.*'."
        )
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            _answer(device)
            works[f"pruning on {device}"] = _device_name(device)
        except Exception as error:  # whatever is wrong with an installation
            problems.append(f"Pruning fails on {device}: {type(error).__name__}: {error}")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        problems.append("PyTorch is built for CUDA but finds no GPU. Check the driver with nvidia-smi.")
    works["model families"] = f"{len(modeling_prunesid.FAMILIES)}, listed by modeling_prunesid.FAMILIES"
    works["clips"] = "torchvision is installed"
    if importlib.util.find_spec("torchvision") is None:
        works["clips"] = "processors of Qwen-VL, InternVL, Video-LLaVA and others need: pip install torchvision"
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        works[f"extra {extra}"] = f"not installed: {', '.join(missing)}" if missing else "installed"
    works["embedded model"] = embedded_folder.describe()
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        works["Hugging Face Hub"] = "offline (HF_HUB_OFFLINE is set): only what is cached can be loaded"

    print_rows([{"what": name, "found": value} for name, value in {**versions, **works}.items()], left=("found",))
    _print_problems(problems)
    return {"versions": versions, "works": works, "problems": problems}


def _check_repo(name: str, revision: str | None) -> dict[str, Any]:
    rows, problems = check_repo(name, revision)
    print_rows(rows, left=("found",))
    _print_problems(problems)
    return {"files": len(rows) - 1, "lines": rows[-1]["lines"], "of_code": rows[-1]["of code"], "problems": problems}


def _print_problems(problems: list[str]) -> None:
    print("\nProblems: none" if not problems else "\nProblems:\n" + "\n".join(f"- {problem}" for problem in problems))


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} thread(s)"


@torch.no_grad()
def _answer(device: str) -> None:
    """`ValueError` unless 8 of 49 tokens are kept, and without pruning the stock class answers the same."""
    image, size = 99, {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PruneSIDLlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 4, **size},
        text_config={"model_type": "llama", "vocab_size": 100, **size},
        image_token_id=image,
        prunesid_config={"budget": 8},
    )
    model = PruneSIDLlavaForConditionalGeneration(config).eval().to(device)
    pixels = torch.rand(1, 3, 28, 28, device=device)
    ids = torch.tensor([[1, *[image] * 49, 2]], device=device)
    kept = model.get_image_features(pixel_values=pixels, return_dict=True)["keep_indices"][0]
    inputs = {"input_ids": ids, "pixel_values": pixels, "max_new_tokens": 2, "do_sample": False}
    model.generate(**inputs)
    model.config.prunesid_config.budget = None
    off = model.generate(**inputs)
    stock = compress(model, budget=None).generate(**inputs)
    if len(kept) != 8 or type(model) is not LlavaForConditionalGeneration or not torch.equal(off, stock):
        raise ValueError(f"a tiny model keeps {len(kept)} tokens in place of 8, or does not answer as the stock class")
