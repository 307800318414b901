"""
Saving and pushing variants: thin ones, the processor that belongs to a model, the model card.

This file does not travel with a repo, whose users trust only what runs a model; `hub.py` calls it where the package is
installed, for models of the package and for those that a repo's own code made.
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging, resolve_revision

from .base_weights import check_weights
from .card import write_card
from .repo_code import carry_code, state_release
from .repo_files import read_fields


logger = logging.get_logger(__name__)

_PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


def save_variant(
    model: Any,
    save_weights: Callable,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    thin: bool = False,
    **kwargs: Any,
) -> None:
    """
    What [`~HubModelMixin.save_pretrained`] does.

    Args:
        model: a [`HubModelMixin`], of this package or of a repo's own code.
        save_weights (`Callable`): upstream's `save_pretrained` of the model.
        save_directory, is_main_process, push_to_hub, thin, kwargs: as of [`~HubModelMixin.save_pretrained`].
    """
    if os.path.isfile(save_directory):
        raise ValueError(f"save_directory must be a folder, got the file {str(save_directory)!r}. Name another one.")
    push = {key: kwargs.pop(key) for key in _PUSH_ARGUMENTS if key in kwargs}
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter is saved, and not the model
        if thin:
            raise ValueError("thin=True saves the settings of a model without adapters. Unload the adapter first.")
        return save_weights(save_directory, is_main_process, push_to_hub=push_to_hub, **push, **kwargs)

    base, revision = find_base(model)
    if thin and base is None:
        raise ValueError(
            "thin=True needs a base to load the weights from, and this model came from no checkpoint. Set "
            "prunesid_config.base_model_name_or_path, or save it with its weights (thin=False)."
        )
    if thin and any(Path(save_directory).glob("*.safetensors")):
        raise ValueError(
            f"thin=True saves no weights, but save_directory={str(save_directory)!r} holds some, which would be "
            "loaded in place of the base's. Save to another folder."
        )
    source = dict(model._sources.get((base, revision), {"revision": revision}))
    revision = source["revision"]
    if thin and base is not None:
        found = resolve_revision(base, revision, cache_dir=source.get("cache_dir"))
        revision = source["revision"] = getattr(found, "resolved", revision)
        check_weights(model, base, source)
    model.config.auto_map = model.own_auto_map()
    if is_main_process:
        os.makedirs(save_directory, exist_ok=True)
        processor = _save_processor(model, save_directory, base, revision, thin)
        if processor is not None:
            model.config.auto_map["AutoProcessor"] = processor

    settings = model.config.prunesid_config
    recorded = settings.base_model_name_or_path, settings.base_model_revision
    settings.base_model_name_or_path, settings.base_model_revision = (base, revision) if thin else (None, None)
    try:
        if not thin:
            save_weights(save_directory, is_main_process, **kwargs)
        elif is_main_process:
            _save_without_weights(model, save_directory)
    finally:
        settings.base_model_name_or_path, settings.base_model_revision = recorded
    if is_main_process:
        package, _, module = type(model).__module__.rpartition(".")
        if Path(save_directory, "parts.py").exists():  # which the code of a repo that an earlier release saved has not
            methods = sys.modules[f"{package}.methods"]
            carry_code(save_directory, module, settings, methods, thin, is_own=package == __package__)
        state_release(save_directory, module)
        write_card(save_directory, model.config, base, thin, push.get("repo_id"), push.get("tags"), revision)
    if push_to_hub and is_main_process:
        push.setdefault("repo_id", Path(save_directory).name)
        push_variant(model, **push, thin=thin, max_shard_size=kwargs.get("max_shard_size", "50GB"))


def push_variant(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
    thin: bool = False,
) -> CommitInfo:
    """What [`~HubModelMixin.push_to_hub`] does. The arguments are upstream's, and `thin`."""
    if thin:
        check_base_is_public(find_base(model)[0])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, thin=thin, repo_id=repo_id, tags=tags, max_shard_size=max_shard_size)
        return push_folder(
            folder,
            repo_id,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def find_base(model: Any) -> tuple[str | None, str | None]:
    """The checkpoint that has this model's weights, and its revision."""
    settings, name = model.config.prunesid_config, model.config.name_or_path
    if settings.base_model_name_or_path is not None:
        return settings.base_model_name_or_path, settings.base_model_revision
    if not name:
        return None, None
    return os.path.abspath(name) if os.path.isdir(name) else name, getattr(model, "loaded_revision", None)


def _save_without_weights(model: Any, folder: str | os.PathLike) -> None:
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    if getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True) is False:
        del config.quantization_config  # the caller's, on weights that the base has in full precision
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _save_processor(
    model: Any, folder: str | os.PathLike, base: str | None, revision: str | None, thin: bool
) -> str | None:
    """
    Save the base's processor, or only its name, with the model's budget. A processor that is in the folder already
    only gets the budget. Returns its entry in the `auto_map`.
    """
    processor_class, path = model._processor_class, Path(folder, "processor_config.json")
    if processor_class is None:
        return None
    arguments = processor_class.arguments_for(model.config.prunesid_config)
    fields = read_fields(folder, path.name, {}) or {}
    if fields and "base_model_name_or_path" not in fields:
        fields |= {name: value for name, value in arguments.items() if name in fields}
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return fields.get("auto_map", {}).get("AutoProcessor")
    if base is None:
        return None
    try:
        processor = processor_class.from_pretrained(base, revision=revision, trust_remote_code=False)
    except Exception as error:  # a model without its processor is better than no model
        logger.warning(f"{folder} gets no processor, because that of {base} cannot be loaded: {error}")
        return None
    for name, value in arguments.items():
        setattr(processor, name, value)
    module = type(processor).__module__.rsplit(".", 1)[-1]
    entry = f"{module}.{type(processor).__name__}"
    if not thin:
        processor.save_pretrained(folder)
        return entry
    fields = {
        "processor_class": type(processor).__name__,
        "auto_map": {"AutoProcessor": entry},
        **arguments,
        "base_model_name_or_path": base,
        "base_model_revision": revision,
    }
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    custom_object_save(processor, folder)
    # `AutoTokenizer` fetches the base's megabytes; `AutoImageProcessor` and its like read settings alone.
    module = "thin" if Path(folder, "parts.py").exists() else "processing"  # in repos of earlier releases
    tokenizer = {"auto_map": {"AutoTokenizer": [None, f"{module}.BaseTokenizer"]}}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", encoding="utf-8")
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        if part is not None and type(part).__module__.startswith("transformers."):
            part.save_pretrained(folder)
    return entry


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
) -> CommitInfo:
    """
    Upload a saved variant in a single commit, which also removes weights of an earlier upload that it does not have.
    An upload that is interrupted leaves the repo as it was; the next one completes it.

    Args:
        folder: a flat folder that `save_pretrained` wrote.
        repo_id: `"org/name"`; created where it does not exist.
        private, token, revision, create_pr, commit_message, commit_description: as for upstream's `push_to_hub`.

    Returns:
        `CommitInfo`: of the one commit, for example its `commit_url`, and with `create_pr` its `pr_url`.
    """
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    names = {path.name for path in files}
    published = api.list_repo_files(repo_id, revision=revision, token=token)
    stale = [name for name in published if name.endswith(_WEIGHT_SUFFIXES) and name not in names]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=commit_message,
        commit_description=commit_description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def check_base_is_public(base: str | None) -> None:
    """Raise a `ValueError` for a base that a thin variant on the Hub could not be loaded from."""
    if base is not None and os.path.isdir(base):
        raise ValueError(
            f"prunesid_config.base_model_name_or_path={base!r} is a folder of this machine, from which nobody else "
            "can load a thin variant. Set it to the base's name on the Hub, or push the weights as well (thin=False)."
        )
