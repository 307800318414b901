"""Make a PruneSID variant of a stock checkpoint, verify it, and publish it.

The output is a Hub folder that loads through every Auto class and `pipeline` with `trust_remote_code=True`: the
configuration, the code, the processor, a model card and the weights. A thin variant has no weights: it names the
checkpoint and commit to load them from, and takes about 300 kB whatever the size of the model. The result is loaded in
a separate process, and must give the same answer as the model in memory before it is kept or pushed. If anything
fails, nothing is left behind; what a killed run left is removed by the next one.

A preset is a name that `prunesid presets` lists, or a file that `prunesid calibrate` wrote; `--budget` overrides its
budget. A preset of ViTCoP makes a variant of ViTCoP. Without `--budget` and `--preset`, a variant keeps its settings:
this makes a variant with weights of a thin one, as engines need it.

A published Mini-Gemini checkpoint (MGM) is converted to Transformers' layout, with the towers that it names. Without
`--budget` and `--preset`, the output is a checkpoint from which variants, also thin ones, can be made.

Examples:
    prunesid convert llava-hf/llava-1.5-7b-hf --budget 64 --thin --output out/llava-64
    prunesid convert llava-hf/llava-1.5-7b-hf --preset llava_1.5_128_release --output out/llava-128
    prunesid convert llava-hf/llava-1.5-7b-hf --preset out/calibrated.json --thin --output out/dynamic \\
        --push-to-hub my-name/llava-1.5-7b-prunesid-dynamic --private
    prunesid convert out/llava-64 --output out/llava-64-full                   # of a thin variant, for vLLM
    prunesid convert MGM-7B --vision-tower clip-vit-large-patch14-336 \\
        --high-res-vision-tower CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup --output out/mini-gemini-7b
"""

import argparse
import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from modeling_prunesid import (
    LayerPrunedLlavaForConditionalGeneration,
    PruneSIDConfig,
    ViTCoPConfig,
    ViTCoPLlavaForConditionalGeneration,
)
from modeling_prunesid.auto import head_of
from modeling_prunesid.presets import check_model_type, read_preset
from modeling_prunesid.publishing import check_base_is_public, push_folder
from prunesid_cli.tables import print_rows
from prunesid_cli.verify import answer


_STAGING = ".convert-"


def find_family(checkpoint: str, revision: str | None = None, method: str | None = "prunesid") -> type:
    """
    Our class for a checkpoint, by the `model_type` in its config.json.

    Args:
        checkpoint: a folder, or a name on the Hub.
        revision: branch, tag or commit.
        method: whose class, `"prunesid"` or `"vitcop"`; None for that of a variant.

    Raises:
        `ValueError`: if the checkpoint is of no supported family.
        `OSError`: if there is no such checkpoint, or it has no config.json.
    """
    fields, _ = PretrainedConfig.get_config_dict(checkpoint, revision=revision)
    if not fields:
        raise OSError(f"{checkpoint} has no config.json.")
    model_type = str(fields.get("model_type"))
    vitcop, layer_pruned = ViTCoPLlavaForConditionalGeneration, LayerPrunedLlavaForConditionalGeneration
    if model_type == vitcop.config_class.model_type or (method == "vitcop" and model_type == "llava"):
        return vitcop
    if model_type == layer_pruned.config_class.model_type:
        return layer_pruned
    if model_type.startswith("mgm"):
        raise ValueError(
            f"{checkpoint} is a published checkpoint of Mini-Gemini (model_type {model_type!r}). Bring it into "
            f"Transformers' layout first: `prunesid convert {checkpoint} --vision-tower ... --output ...`."
        )
    try:
        return head_of(model_type)
    except AttributeError as error:  # the installed Transformers lacks it
        raise ValueError(f"{checkpoint} cannot be loaded: {error}") from error


def find_place(output: Path) -> tuple[Path, Path]:
    """
    The folder that `--output` stands for, links followed, and the nearest one above it that exists.

    Raises:
        `ValueError`: if it is no new or empty folder, or cannot become one.
    """
    for path in (output, *output.absolute().parents):
        if os.path.lexists(path) and not path.is_dir():
            kind = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "a file"
            what = "" if path == output else f", but {path} is {kind}"
            raise ValueError(
                f"--output must be a new or an empty folder, got {output}{what or f', {kind}'}. Remove it or choose "
                "another one."
            )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output must be a new or an empty folder, got {output}. Remove it or choose another one.")
    output = output.resolve()
    return output, next(parent for parent in output.parents if parent.is_dir())


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` while the block runs. Folders that killed runs left there are removed first."""
    with ExitStack() as stack:
        with _lock(parent, is_patient=True):  # so that nobody takes a folder for left that is not locked yet
            for left in parent.glob(f"{_STAGING}*"):
                try:
                    with _lock(left):
                        print(f"removing {left}, which a killed run left", file=sys.stderr)
                        shutil.rmtree(left, ignore_errors=True)
                except OSError:  # in use, or another user's
                    continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=_STAGING)))
            stack.enter_context(_lock(folder))
        yield folder


@contextmanager
def _lock(folder: Path, is_patient: bool = False) -> Iterator[None]:
    """Hold a folder until the block or the process itself ends; an `OSError` if another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def convert(
    checkpoint: str,
    output: Path,
    settings: dict[str, Any] | None,
    thin: bool = False,
    revision: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    method: str = "prunesid",
    made_from: str | None = None,
) -> dict[str, Any]:
    """
    Write a variant to the folder `output`, verified, and push it where `push_to_hub` names a repo. Settings of None
    are those of the checkpoint, which then is a variant; else they are of `method`, `"prunesid"` or `"vitcop"`. The
    card says `made_from`, where the checkpoint is a temporary one.

    Returns:
        `dict`: what was written, for the last line of the script.

    Raises:
        `ValueError`: for an unsupported or incomplete checkpoint, invalid settings, a folder that is not empty, or a
            variant that does not give the answer of the model in memory.
        `OSError`: if the checkpoint cannot be read or the output not be written.
    """
    model_class = find_family(checkpoint, revision, None if settings is None else method)
    if thin and push_to_hub:
        check_base_is_public(checkpoint)
    target, existing = find_place(output)
    with staging_folder(existing) as staging:
        folder = staging / "variant"
        model, info = model_class.from_pretrained(
            checkpoint,
            dtype="auto",
            device_map="auto",
            output_loading_info=True,
            **({} if settings is None else {f"{method}_config": settings}),
            **({} if revision is None else {"revision": revision}),
        )
        if info["missing_keys"]:
            raise ValueError(f"{checkpoint} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, ...")
        if made_from is not None:
            model.config.name_or_path = made_from
        model.save_pretrained(folder, thin=thin, repo_id=push_to_hub or str(output))
        has_processor = (folder / "processor_config.json").exists()
        processor = model_class._processor_class.from_pretrained(folder) if has_processor else None
        expected, budget = answer(model, processor), model.config.prunesid_config.budget
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        verify(folder, expected, has_processor)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, target)
        target.chmod(0o755)

    report = {
        "model": made_from or checkpoint,
        "class": model_class.__name__,
        "budget": budget,
        "thin": thin,
        "processor": has_processor,
        "output": str(output),
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
    }
    if push_to_hub:
        try:
            report["commit"] = push_folder(output, push_to_hub, private=private).commit_url
        except Exception as error:
            raise OSError(
                f"{output} is complete, but could not be pushed, and nothing of it was published: {error}\nPush it "
                f"again: hf upload {push_to_hub} {output}"
            ) from error
    return report


def verify(folder: Path, expected: list[int], has_processor: bool) -> None:
    """Raise a `ValueError` unless a clean process loads the folder without loss and answers `expected`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as modules:
        script = str(Path(__file__).with_name("verify.py"))
        command = [sys.executable, "-I", script, str(folder), *([] if has_processor else ["--no-processor"])]
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=modules, env=environment)
    if done.returncode != 0:
        raise ValueError(f"The variant was written, but a clean process cannot load it:\n{done.stderr.strip()}")
    report = json.loads(done.stdout.splitlines()[-1])
    found = report.pop("tokens")
    if any(report.values()):
        raise ValueError(f"The variant was written, but its weights do not load without loss: {report}")
    if found != expected:
        raise ValueError(
            f"The variant was written, but a clean process answers {found}, and the model in memory {expected}."
        )


def parse_budget(text: str) -> int | float:
    """A count (`64`) or a share (`0.1`), from the command line; whether it is in range is checked with the others."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError as error:
        message = f"budget must be a positive integer such as 64, or a share such as 0.1, got {text!r}"
        raise argparse.ArgumentTypeError(message) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="stock checkpoint or variant: a folder, or a name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--budget", type=parse_budget, help="tokens kept of each view, or their share as in 0.25")
    parser.add_argument("--preset", help="a name of `prunesid presets`, or the path of a JSON file")
    parser.add_argument("--dynamic", action="store_true", help="a dynamic budget; needs the reference")
    parser.add_argument("--reference-information", type=float, help="mean information score; `prunesid calibrate`")
    parser.add_argument("--thin", action="store_true", help="save no weights: load them from MODEL")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="publish the variant as this repo")
    parser.add_argument("--private", action="store_true", default=None, help="create a private repo")
    towers = parser.add_argument_group("published checkpoints of Mini-Gemini (MGM)")
    towers.add_argument("--vision-tower", type=Path, help="folder of CLIP ViT-L/14-336")
    towers.add_argument("--high-res-vision-tower", type=Path, help="folder of OpenCLIP's ConvNeXt, if MGM lacks it")


def read_settings(arguments: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """
    The settings that the arguments ask for, as fields of `PruneSIDConfig` or `ViTCoPConfig`, None for those of a
    variant; and their method, `"prunesid"` or `"vitcop"`.

    Raises:
        `ValueError`: for invalid settings, none of a checkpoint that has no own ones, or a preset of another model.
    """
    fields, _ = PretrainedConfig.get_config_dict(arguments.model, revision=arguments.revision)
    if arguments.budget is None and arguments.preset is None:
        if "prunesid_config" not in fields and "vitcop_config" not in fields:
            raise ValueError(f"one of --budget and --preset is required: {arguments.model} has no settings of its own")
        if arguments.dynamic or arguments.reference_information is not None:
            raise ValueError("--dynamic and --reference-information change a budget; give --budget or --preset too")
        return None, "prunesid"
    settings, method = {}, "prunesid"
    if arguments.preset is not None:
        settings, method, _ = read_preset(arguments.preset)
        model_class = find_family(arguments.model, arguments.revision, method)
        check_model_type(arguments.preset, model_class.config_class.model_type)
    if arguments.budget is not None:
        settings["budget"] = arguments.budget
    if arguments.reference_information is not None:
        settings["reference_information"] = arguments.reference_information
    if arguments.dynamic:
        settings["dynamic"] = True
    (PruneSIDConfig if method == "prunesid" else ViTCoPConfig)(**settings)
    return settings, method


def is_mini_gemini(arguments: argparse.Namespace) -> bool:
    """
    Whether the model is a published checkpoint of Mini-Gemini.

    Raises:
        `ValueError`: for arguments that such a checkpoint lacks, or that others do not have.
    """
    fields, _ = PretrainedConfig.get_config_dict(arguments.model, revision=arguments.revision)
    if not str(fields.get("model_type")).startswith("mgm"):
        if arguments.vision_tower is not None or arguments.high_res_vision_tower is not None:
            raise ValueError(
                f"--vision-tower and --high-res-vision-tower are for published checkpoints of Mini-Gemini, got "
                f"{arguments.model} of model_type {fields.get('model_type')!r}. Leave them out."
            )
        return False
    if not Path(arguments.model).is_dir() or arguments.vision_tower is None:
        raise ValueError(
            f"{arguments.model} is a published checkpoint of Mini-Gemini: it must be a folder, with --vision-tower "
            "that of CLIP ViT-L/14-336, and --high-res-vision-tower that of OpenCLIP's ConvNeXt if the checkpoint "
            "does not hold it. Download them with `hf download`."
        )
    if arguments.thin or arguments.push_to_hub:
        raise ValueError(
            f"{arguments.model} has no weights in Transformers' layout that a thin variant could take. Convert it "
            "without --thin, --push-to-hub, --budget and --preset first, then convert the output."
        )
    return True


def run_mini_gemini(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bring a published checkpoint into Transformers' layout, and make a variant of it where settings are given."""
    from prunesid_cli.mini_gemini_checkpoint import bring_into_layout

    towers = arguments.vision_tower, arguments.high_res_vision_tower
    target, existing = find_place(arguments.output)
    with staging_folder(existing) as staging:
        folder = staging / "mini_gemini"
        bring_into_layout(Path(arguments.model), *towers, folder)
        if arguments.budget is not None or arguments.preset is not None:
            given = argparse.Namespace(**{**vars(arguments), "model": str(folder)})
            settings, method = read_settings(given)
            return convert(str(folder), arguments.output, settings, method=method, made_from=arguments.model)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, target)
        target.chmod(0o755)
    print(f"{arguments.output} holds the model and its processor in Transformers' layout. Make variants of it.")
    return {"model": arguments.model, "class": "MiniGeminiForConditionalGeneration", "output": str(arguments.output)}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if is_mini_gemini(arguments):
        return run_mini_gemini(arguments)
    settings, method = read_settings(arguments)
    report = convert(
        arguments.model,
        arguments.output,
        settings,
        thin=arguments.thin,
        revision=arguments.revision,
        push_to_hub=arguments.push_to_hub,
        private=arguments.private,
        method=method,
    )
    sizes = {path.name: path.stat().st_size for path in sorted(arguments.output.iterdir())}
    print_rows([{"file": name, "bytes": f"{size:,}"} for name, size in {**sizes, "in all": report["bytes"]}.items()])
    question = "" if report["processor"] else " (to text alone: the checkpoint has no processor that loads)"
    print(f"A clean process loads it and gives the same answer{question}.")
    return report
