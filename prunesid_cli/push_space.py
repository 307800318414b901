"""Publish the page of `prunesid app` as a Space on the Hub, with the code of this package and a card.

Examples:
    prunesid push-space my-name/prunesid
    prunesid push-space my-name/prunesid-llava --model llava-hf/llava-1.5-7b-hf --private
"""

import argparse
import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

import modeling_prunesid
from modeling_prunesid.presets import FOLDER as PRESETS
from prunesid_cli.embedded_folder import FOLDER, unpack


GRADIO = "6.31.0"  # the page was tested with it
# Of the Space: what setup.cfg has for the package and its extra `app`. The Space brings Gradio itself.
REQUIREMENTS = (
    "accelerate>=1.1",
    "av>=13",
    "huggingface-hub>=1.0",
    "numpy>=1.17",
    "onnx>=1.15",
    "packaging>=20",
    "pillow>=10.0",
    "rich>=13.8",
    "safetensors>=0.5",
    "torch>=2.6",
    "transformers>=5.18",
)
CPU_WHEELS = "--extra-index-url https://download.pytorch.org/whl/cpu"
PACKAGES = (Path(modeling_prunesid.__file__).parent, Path(__file__).parent)
EMBEDDED_FILES = ("*.json", "*.jinja", "README.md", "model-00001-of-00002.safetensors")

CARD = """---
title: What does an AI need to see?
emoji: 🔍
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
short_description: See which parts of a picture a model needs
tags:
- visual-token-pruning
{models}---

# What does an AI need to see of a picture?

Ask about a picture and choose how many of its visual tokens the language model gets. The page shows which patches are
kept, why the others were dropped, and the answers with all and with the kept ones side by side.

It runs `prunesid app` of PruneSID for Transformers {version}, after "Prune Redundancy, Preserve Essence"
([paper](https://arxiv.org/abs/2603.09480)), with {model}. Pictures stay in the Space's memory for up to an hour, and
nobody else sees them.
"""
APP = """from prunesid_cli.app import serve


serve(model={model!r}, host="0.0.0.0", port=7860)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="ORG/NAME", help="the Space; it is created where there is none")
    parser.add_argument("--model", help="checkpoint or variant on the Hub (default: the embedded model)")
    parser.add_argument("--private", action="store_true", help="only its owner sees it")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return push_space(arguments.repo, arguments.model, arguments.private)


def space_files(model: str | None) -> dict[str, bytes]:
    """
    What the Space holds, by path.

    Raises:
        `ValueError`: for a model that is a folder of this machine.
    """
    if model is not None and os.path.isdir(model):
        raise ValueError(
            f"--model must be on the Hub for a Space to load it, got the folder {model!r}. Push it first."
        )
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path
        for package in PACKAGES
        for path in sorted([*package.glob("*.py"), *package.glob("baselines/*.py"), *package.glob("app_files/*")])
        if path.is_file()
    }
    files |= {f"modeling_prunesid/configuration/{path.name}": path for path in sorted(PRESETS.glob("*.json"))}
    if model is None:
        unpack()
        files |= {f"embedded/{path.name}": path for pattern in EMBEDDED_FILES for path in sorted(FOLDER.glob(pattern))}
    card = CARD.format(
        gradio=GRADIO,
        version=modeling_prunesid.__version__,
        models="" if model is None else f"models:\n- {model}\n",
        model="a small model for synthetic scenes, which it carries" if model is None else f"`{model}`",
    )
    written = {
        "README.md": card,
        "app.py": APP.format(model=model),
        "requirements.txt": "\n".join((CPU_WHEELS, *REQUIREMENTS)) + "\n",
    }
    return {path: source.read_bytes() for path, source in files.items()} | {
        path: text.encode() for path, text in written.items()
    }


def push_space(repo: str, model: str | None = None, private: bool = False) -> dict[str, Any]:
    """
    Publish the page in a single commit, which also removes what an earlier one left.

    Args:
        repo (`str`): `"org/name"`, created where it does not exist.
        model (`str`, *optional*): a checkpoint on the Hub; the embedded model by default.
        private (`bool`): of a new Space.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"The Space must be named ORG/NAME, got {repo!r}.")
    files, api = space_files(model), HfApi()
    api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    published = api.list_repo_files(repo, repo_type="space")
    stale = [path for path in published if path not in files and path != ".gitattributes"]
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()),
            *(CommitOperationDelete(path_in_repo=path) for path in stale),
        ],
        repo_type="space",
        commit_message="prunesid app",
    )
    return {"space": repo, "files": len(files), "commit": commit.oid}
