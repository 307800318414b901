"""What lets Auto classes, pipelines and the Hub treat our classes as they treat the stock ones."""

import copy
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import safe_open
from transformers import GenerationConfig, PretrainedConfig
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from .card import write_card


logger = logging.get_logger(__name__)

# How files are fetched, from the variant and from its base alike.
ACCESS_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What a caller says of the variant's repo, and what is therefore never said of its base.
VARIANT_ARGUMENTS = ("revision", "code_revision", "subfolder", "trust_remote_code", "_commit_hash", "_from_auto")
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
_DEEPEST_JSON = 64  # levels; upstream copies configurations recursively
_DYNAMIC_MODULES = "transformers_modules."


def read_fields(name: str | os.PathLike, file: str, location: dict[str, Any]) -> dict[str, Any] | None:
    """
    The JSON object in a file of a repo or folder, or None where it has no such file.

    Raises:
        `ValueError`: if the file holds something else: broken JSON, a list, null, or objects in 64 others.
        `OSError`: if there is no such repo, or it cannot be reached.
    """
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location)
    if path is None:
        return None
    problem = None
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            problem = f"it is {json.dumps(fields)[:40]}"
        elif _is_deeper(fields, _DEEPEST_JSON):
            problem = f"it nests more than {_DEEPEST_JSON} levels"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problem = str(error)
    except RecursionError:
        problem = f"it nests more than {_DEEPEST_JSON} levels"
    if problem is not None:
        raise ValueError(f"{file} of {name} must hold a JSON object, but {problem}. Save the variant again.")
    return fields


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(
        _is_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def read_base(fields: dict[str, Any], where: str) -> tuple[str | None, str | None]:
    """
    Name and revision of the base in the fields of a variant; None, None where it is no thin variant.

    Raises:
        `ValueError`: if one of them is not a name.
    """
    values = []
    for name in ("base_model_name_or_path", "base_model_revision"):
        value = fields.get(name)
        if value is not None and (not isinstance(value, str) or value == ""):
            raise ValueError(
                f"{where}.{name} must be a non-empty string or null, got {value!r}. Save the variant again."
            )
        values.append(value)
    return values[0], values[1]


class HubModelMixin:
    """
    A saved model carries all that others need to load it: its code, the processor, a card, and its weights or, in a
    thin variant, the name of the base that has them.
    """

    # Auto class: name of ours, in the modeling file of the family.
    _auto_map: dict[str, str] = {}
    # The family's processor, which is saved with the model where that of its checkpoint is known.
    _processor_class: Any = None
    # (name, revision as it was asked for): where and at which commit the weights were found.
    _sources: dict[tuple[str | None, str | None], dict[str, Any]] = {}

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that upstream initialises our weights as its own: they are the same modules."""
        return False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PretrainedConfig | str | os.PathLike | None = None,
        base_trust_remote_code: bool = False,
        **kwargs: Any,
    ):
        r"""
        Upstream's `from_pretrained`. A checkpoint without weights whose `prunesid_config` names a
        `base_model_name_or_path` takes them from there, with the caller's arguments (dtype, device_map,
        quantization_config, cache_dir, token, ...). `revision`, `subfolder` and `trust_remote_code` are said of the
        variant alone: the base has the revision `base_model_revision`.

        Args:
            base_trust_remote_code (`bool`, defaults to `False`):
                Also run Python files of the base of a thin variant, such as a `custom_generate` of its own. Without it
                none of them runs, whatever `trust_remote_code` is. It has no meaning for other checkpoints.

        Raises:
            `OSError`: if the base cannot be found or reached.
            `ValueError`: if the base is of another family, its weights do not fit the variant's architecture, or a
                file of the variant does not hold what it should.
        """
        name = pretrained_model_name_or_path
        own_class = cls._class_in(name, kwargs.get("trust_remote_code"))
        if own_class is not cls:
            opt_in = {"base_trust_remote_code": True} if base_trust_remote_code else {}
            return own_class.from_pretrained(name, *model_args, config=config, **opt_in, **kwargs)
        location = {key: kwargs[key] for key in (*ACCESS_ARGUMENTS, "revision", "subfolder") if key in kwargs}
        if name is None or _find_base_of(config, name, location) is None or _has_weights(name, location):
            loaded = super().from_pretrained(name, *model_args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.loaded_revision = _pinned(kwargs.get("revision"))
            model._remember_source(name, model.loaded_revision, location)
            return loaded

        if not isinstance(config, PretrainedConfig):
            kwargs.pop("trust_remote_code", None)
            placement = {
                key: kwargs.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in kwargs
            }
            config, kwargs = cls.config_class.from_pretrained(
                name if config is None else config, return_unused_kwargs=True, **(kwargs | location)
            )
            kwargs |= placement | {key: location[key] for key in ACCESS_ARGUMENTS if key in location}
        return cls._from_base(name, config, location, model_args, kwargs, base_trust_remote_code)

    @classmethod
    def _class_in(cls, name: str | os.PathLike | None, is_trusted: bool | None) -> type:
        """
        This class as a trusted local folder has it. Transformers registers what it loaded from one folder for the
        configuration's class, which another folder with the same configuration file and other code shares.
        """
        if (
            not is_trusted
            or name is None
            or not os.path.isdir(name)
            or not cls.__module__.startswith(_DYNAMIC_MODULES)
        ):
            return cls
        try:
            return get_class_from_dynamic_module(f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}", name)
        except (OSError, AttributeError):  # the folder has other code or none
            return cls

    @classmethod
    def _from_base(cls, name, config, location, model_args, kwargs, base_trust_remote_code):
        settings = config.prunesid_config
        base, revision = settings.base_model_name_or_path, settings.base_model_revision or "main"
        kwargs = {key: value for key, value in kwargs.items() if key not in VARIANT_ARGUMENTS}
        kwargs["trust_remote_code"] = base_trust_remote_code
        if kwargs.get("generation_config") is None:
            kwargs["generation_config"] = _read_generation_config(name, location)
        adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        if "_adapter_model_path" not in adapter:
            adapter.pop("revision", None)  # that of the variant
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"adapter_kwargs": adapter, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            access = {key: kwargs[key] for key in ACCESS_ARGUMENTS if key in kwargs}
            _check_family(base, config, PretrainedConfig.get_config_dict(base, revision=revision, **access)[0])
            model, info = super().from_pretrained(base, *model_args, config=config, revision=revision, **kwargs)
        except OSError as error:
            raise OSError(
                f"{name} takes its weights from prunesid_config.base_model_name_or_path={base!r} at revision "
                f"{revision!r}, which cannot be loaded: {error}"
            ) from error
        _check_fit(base, info, has_head=cls.can_generate())
        model.name_or_path = model.config.name_or_path = str(name)
        model.loaded_revision = _pinned(location.get("revision"))
        model._remember_source(base, settings.base_model_revision, access)
        return (model, info) if wants_info else model

    def _remember_source(self, name: str | os.PathLike, revision: str | None, access: dict[str, Any]) -> None:
        """Keep the commit that was just loaded, which a branch may leave behind until the model is saved."""
        if name is None:
            return
        location = {"cache_dir": access["cache_dir"]} if access.get("cache_dir") is not None else {}
        commit = find_commit(name, revision, {**location, "local_files_only": True})
        self._sources = {**self._sources, (str(name), revision): {**location, "revision": commit or revision}}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        thin: bool = False,
        **kwargs: Any,
    ) -> None:
        r"""
        Upstream's `save_pretrained`, with the code for every Auto class, the processor of the checkpoint that the
        model was loaded from, and a model card.

        Args:
            thin (`bool`, defaults to `False`):
                Leave the weights out and name the base that they are loaded from: the checkpoint that this model came
                from, or `prunesid_config.base_model_name_or_path`, at the commit that was loaded. Every weight is
                compared with the base's, whose files are read once for it; those that are quantised cannot be, and
                are taken to be the base's.

        Raises:
            `ValueError`: if `save_directory` is a file; if `thin` and no base is known, a weight is not the base's
                (trained, merged with an adapter, resized), the folder holds weights already, or the model has an
                adapter.
            `OSError`: if `thin` and the base's weights cannot be read.
        """
        if os.path.isfile(save_directory):
            raise ValueError(
                f"save_directory must be a folder, got the file {str(save_directory)!r}. Name another one."
            )
        push = {key: kwargs.pop(key) for key in _PUSH_ARGUMENTS if key in kwargs}
        if getattr(self, "_hf_peft_config_loaded", False):  # an adapter is saved, and not the model
            if thin:
                raise ValueError("thin=True saves the settings of a model without adapters. Unload the adapter first.")
            return super().save_pretrained(save_directory, is_main_process, push_to_hub=push_to_hub, **push, **kwargs)

        base, revision = self._find_base()
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
        source = dict(self._sources.get((base, revision), {"revision": revision}))
        revision = source["revision"]
        if thin and base is not None:
            revision = source["revision"] = find_commit(base, revision, source) or revision
            _check_weights(self, base, source)
        config_class, module = type(self.config), type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {
            "AutoConfig": f"{config_class.__module__.rsplit('.', 1)[-1]}.{config_class.__name__}",
            **{auto_class: f"{module}.{name}" for auto_class, name in self._auto_map.items()},
        }
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            processor = self._save_processor(save_directory, base, revision, thin)
            if processor is not None:
                self.config.auto_map["AutoProcessor"] = processor

        settings = self.config.prunesid_config
        recorded = settings.base_model_name_or_path, settings.base_model_revision
        settings.base_model_name_or_path, settings.base_model_revision = (base, revision) if thin else (None, None)
        try:
            if not thin:
                super().save_pretrained(save_directory, is_main_process, **kwargs)
            elif is_main_process:
                self._save_without_weights(save_directory)
        finally:
            settings.base_model_name_or_path, settings.base_model_revision = recorded
        if is_main_process:
            write_card(save_directory, self.config, base, thin, push.get("repo_id"), push.get("tags"), revision)
        if push_to_hub and is_main_process:
            push.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**push, thin=thin, max_shard_size=kwargs.get("max_shard_size", "50GB"))

    def push_to_hub(
        self,
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
        r"""
        Upstream's `push_to_hub` of all that [`~HubModelMixin.save_pretrained`] writes, in a single commit, so that
        nothing is published by half.

        Args:
            thin (`bool`, defaults to `False`):
                Leave the weights out; see [`~HubModelMixin.save_pretrained`].

        Raises:
            `ValueError`: if `thin` and the base is a folder of this machine, which nobody else can load.
        """
        if thin:
            check_base_is_public(self._find_base()[0])
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, thin=thin, repo_id=repo_id, tags=tags, max_shard_size=max_shard_size)
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

    def _find_base(self) -> tuple[str | None, str | None]:
        """The checkpoint that has this model's weights, and its revision."""
        settings, name = self.config.prunesid_config, self.config.name_or_path
        if settings.base_model_name_or_path is not None:
            return settings.base_model_name_or_path, settings.base_model_revision
        if not name:
            return None, None
        return os.path.abspath(name) if os.path.isdir(name) else name, getattr(self, "loaded_revision", None)

    def _save_without_weights(self, folder: str | os.PathLike) -> None:
        config = copy.deepcopy(self.config)
        config.architectures, config.dtype = [type(self).__name__], str(self.dtype).removeprefix("torch.")
        if getattr(getattr(self, "hf_quantizer", None), "pre_quantized", True) is False:
            del config.quantization_config  # the caller's, on weights that the base has in full precision
        custom_object_save(self, folder, config=config)
        config.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)

    def _save_processor(self, folder, base, revision, thin) -> str | None:
        """
        Save the base's processor, or only its name, with the model's budget. A processor that is in the folder already
        only gets the budget. Returns its entry in the `auto_map`.
        """
        processor_class, path = self._processor_class, Path(folder, "processor_config.json")
        if processor_class is None:
            return None
        arguments = processor_class.arguments_for(self.config.prunesid_config)
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
        tokenizer = {"auto_map": {"AutoTokenizer": [None, "processing.BaseTokenizer"]}}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", encoding="utf-8")
        for name in ("image_processor", "video_processor"):
            part = getattr(processor, name, None)
            if part is not None and type(part).__module__.startswith("transformers."):
                part.save_pretrained(folder)
        return entry


class AutoModelMixin:
    """
    What `AutoModel` makes of a repo: `from_pretrained` a model that can `generate`, as users of a vision-language repo
    expect, and `from_config` the base model, as serving engines expect.
    """

    _base_class: Any
    _generating_class: Any

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls._generating_class.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return cls._base_class._from_config(config, **kwargs)


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
    An upload that is broken off leaves the repo as it was; the next one completes it.

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


def _pinned(revision: str | None) -> str | None:
    return None if revision in (None, "main") else str(revision)


def _find_base_of(config: Any, name: str | os.PathLike, location: dict[str, Any]) -> str | None:
    """The base that a variant's configuration names, None for other checkpoints."""
    if isinstance(config, PretrainedConfig):
        return getattr(getattr(config, "prunesid_config", None), "base_model_name_or_path", None)
    try:
        fields = read_fields(name if config is None else config, CONFIG_NAME, location)
    except OSError:  # which upstream words itself
        return None
    for key in ("prunesid_config", "vitcop_config"):
        settings = (fields or {}).get(key)
        if isinstance(settings, dict):
            return read_base(settings, key)[0]
        if settings is not None:
            raise ValueError(f"{key} in {CONFIG_NAME} of {name} must be a JSON object or null, got {settings!r}.")
    return None


def _read_generation_config(name: str | os.PathLike, location: dict[str, Any]) -> GenerationConfig | None:
    if read_fields(name, GENERATION_CONFIG_NAME, location) is None:
        return None
    return GenerationConfig.from_pretrained(name, **location)


def find_commit(name: str | os.PathLike, revision: str | None, location: dict[str, Any]) -> str | None:
    """The commit that a branch, tag or commit of a repo on the Hub stands for; None for a folder, or if unknown."""
    if os.path.isdir(name):
        return None
    location = {key: value for key, value in location.items() if key != "revision"}
    try:
        path = cached_file(name, CONFIG_NAME, revision=revision, **location)
    except OSError:
        return None
    found = re.search(r"/snapshots/([0-9a-f]{40})/", Path(path).as_posix()) if path is not None else None
    return found and found[1]


def _has_weights(name: str | os.PathLike, location: dict[str, Any]) -> bool:
    return any(
        cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location) is not None
        for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )


def _check_family(base: str, config: PretrainedConfig, fields: dict[str, Any]) -> None:
    """The base must be a checkpoint of the same parts: `model_type` of the whole, of its tower and language model."""
    stock = config.model_type.removeprefix("prunesid_").removeprefix("vitcop_")
    parts = [("", {config.model_type, stock}, fields)]
    for part in ("text_config", "vision_config"):
        if isinstance(fields.get(part), dict) and hasattr(getattr(config, part, None), "model_type"):
            parts.append((f"{part}.", {getattr(config, part).model_type}, fields[part]))
    for part, expected, found in parts:
        if found.get("model_type") not in (None, *expected):
            raise ValueError(
                f"prunesid_config.base_model_name_or_path={base!r} is no base of this variant: its {part}model_type "
                f"is {found['model_type']!r}, expected {' or '.join(map(repr, sorted(expected)))}. Name the "
                "checkpoint that the variant was made from."
            )


def _check_fit(base: str, info: dict[str, Any], has_head: bool) -> None:
    # Without a head, the base's head is left over.
    for kind in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if has_head else [])):
        if info[kind]:
            keys = sorted(map(str, info[kind]))
            raise ValueError(
                f"The weights of prunesid_config.base_model_name_or_path={base!r} do not fit this variant: "
                f"{len(keys)} {kind.replace('_', ' ')}, for example {', '.join(keys[:3])}. The base may have changed: "
                "pin base_model_revision to the one that the variant was made from, or convert the base anew."
            )


def _check_weights(model: Any, base: str, source: dict[str, Any]) -> None:
    """
    Raise a `ValueError` unless every weight of the model is the base's, bit for bit in the model's dtype.

    Names differ by what upstream renames when it loads: the base's tensor is the one of the same shape that shares
    most of the last parts of the name, or any of those that share as many. Tied weights count as one.
    """
    quantised = getattr(model, "hf_quantizer", None) is not None
    of_base = _weights_of(base, source)
    by_last: dict[str, list[str]] = {}
    for name in of_base:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    verdicts: dict[Any, bool] = {}
    names: dict[Any, str] = {}
    for name, identity, tensor in _weights_in(model):
        if quantised and not (type(tensor) is torch.Tensor and tensor.is_floating_point()):
            continue
        shares = {other: _shared_parts(name, other) for other in by_last.get(name.rpartition(".")[2], [])}
        shares = {other: count for other, count in shares.items() if of_base[other][0] == tuple(tensor.shape)}
        if quantised and not shares:
            continue
        nearest = [other for other, count in shares.items() if count == max(shares.values())]
        names.setdefault(identity, name)
        if not verdicts.get(identity):
            verdicts[identity] = any(_is_same(of_base[other][1](), tensor) for other in nearest)
    changed = [names[key] for key, is_same in verdicts.items() if not is_same]
    if changed:
        raise ValueError(
            f"thin=True saves no weights, but {len(changed)} of this model's are not those of its base {base!r}, for "
            f"example {', '.join(changed[:3])}: they were trained, merged, resized or loaded from elsewhere. Save the "
            "model with its weights (thin=False)."
        )


def _shared_parts(name: str, other: str) -> int:
    count = 0
    for ours, theirs in zip(reversed(name.split(".")), reversed(other.split("."))):
        if ours != theirs:
            break
        count += 1
    return count


def _is_same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    theirs, ours = (value.contiguous().reshape(-1).view(torch.uint8) for value in (theirs.to(ours.dtype), ours.cpu()))
    return torch.equal(theirs, ours)


def _weights_in(model: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """
    Name, identity and value of what would be saved. Tied weights have one identity; those that are offloaded or spread
    over devices are brought together one at a time.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            from accelerate.utils import align_module_device

            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            with align_module_device(module, "cpu"):
                yield name, name, getattr(module, leaf).detach().clone()
        elif hasattr(tensor, "full_tensor"):
            yield name, name, tensor.full_tensor()
        else:
            yield name, (tensor.data_ptr() or name, tuple(tensor.shape)), tensor.detach()


def _weights_of(base: str, source: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Shape of each of the base's weights and what reads it, by its name in the files."""
    weights: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    for path in _weight_files(base, source):
        if path.endswith(".safetensors"):
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118
                weights[name] = (
                    tuple(file.get_slice(name).get_shape()),
                    lambda file=file, name=name: file.get_tensor(name),
                )
        else:
            for name, tensor in torch.load(path, map_location="cpu", mmap=True, weights_only=True).items():
                weights[name] = tuple(tensor.shape), lambda tensor=tensor: tensor
    return weights


def _weight_files(base: str, source: dict[str, Any]) -> list[str]:
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        path = cached_file(base, single, _raise_exceptions_for_missing_entries=False, **source)
        if path is not None:
            return [path]
        fields = read_fields(base, index, source)
        if fields is not None:
            shards = sorted(set(fields["weight_map"].values()))
            return [cached_file(base, shard, **source) for shard in shards]
    raise OSError(
        f"thin=True compares the weights with those of the base, but {base!r} has no {SAFE_WEIGHTS_NAME}. Name a base "
        "that has weights, or save the model with its own (thin=False)."
    )
