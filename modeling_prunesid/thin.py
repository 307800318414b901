"""
What loads thin variants: weights, processor and tokenizer of the base that they name, at the commit that they name,
and none of its code. A repo with weights does not have this file.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from .repo_files import ACCESS_ARGUMENTS, VARIANT_ARGUMENTS, read_base, read_fields


def is_thin(name: Any, config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a checkpoint, or the configuration given for it, names a base and has no weights of its own."""
    location = _location(kwargs)
    return (
        name is not None
        and _find_base(name, config, location) is not None
        and not any(
            cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location) is not None
            for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
        )
    )


def load_model(
    model_class: Any, load: Callable, name: Any, model_args: tuple, config: Any, trust: bool, kwargs: dict[str, Any]
) -> tuple[Any, tuple[str, str | None]]:
    """
    A model of a thin variant, as `from_pretrained` returns it; and the name and the revision of its base.

    Args:
        model_class: a [`HubModelMixin`].
        load (`Callable`): upstream's `from_pretrained` of it.
        name, model_args, config, kwargs: what it is asked for.
        trust (`bool`): `base_trust_remote_code`.
    """
    location = _location(kwargs)
    access = {key: value for key, value in location.items() if key in ACCESS_ARGUMENTS}
    if not isinstance(config, PretrainedConfig):
        placement = {key: kwargs[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in kwargs}
        others = {key: value for key, value in kwargs.items() if key not in placement and key != "trust_remote_code"}
        config, kwargs = model_class.config_class.from_pretrained(
            name if config is None else config, return_unused_kwargs=True, **others
        )
        kwargs |= placement | access
    settings = config.prunesid_config
    base, revision = settings.base_model_name_or_path, settings.base_model_revision or "main"
    kwargs = {key: value for key, value in kwargs.items() if key not in VARIANT_ARGUMENTS}
    if kwargs.get("generation_config") is None and read_fields(name, GENERATION_CONFIG_NAME, location) is not None:
        kwargs["generation_config"] = GenerationConfig.from_pretrained(name, **location)
    adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
    if "_adapter_model_path" not in adapter:
        adapter.pop("revision", None)  # that of the variant
    wants_info = kwargs.pop("output_loading_info", False)
    kwargs |= {"adapter_kwargs": adapter, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        _check_family(base, config, PretrainedConfig.get_config_dict(base, revision=revision, **access)[0])
        model, info = load(base, *model_args, config=config, revision=revision, trust_remote_code=trust, **kwargs)
    except OSError as error:
        raise OSError(
            f"{name} takes its weights from prunesid_config.base_model_name_or_path={base!r} at revision "
            f"{revision!r}, which cannot be loaded: {error}"
        ) from error
    _check_fit(base, info, has_head=model_class.can_generate())
    model.name_or_path = model.config.name_or_path = str(name)
    loaded = (model, info) if wants_info else model
    return loaded, (base, settings.base_model_revision)


def load_processor(load: Callable, name: Any, names: list[str], trust: bool, kwargs: dict[str, Any]) -> Any:
    """
    The processor of a variant: a thin one's is that of its base, with the arguments of these names as it saved them.

    Args:
        load (`Callable`): upstream's `from_pretrained`.
        name, kwargs: what it is asked for.
        names (`list[str]`): of the arguments that are ours.
        trust (`bool`): `base_trust_remote_code`.
    """
    base, arguments, fields = _locate(name, trust, kwargs)
    if arguments is kwargs:
        return load(name, **kwargs)
    processor = _load_from_base(load, base, {key: fields[key] for key in names if key in fields} | arguments)
    processor._thin_variant = str(name)
    return processor


def not_served(name: str) -> ValueError:
    """The error of an engine that is given a thin variant."""
    return ValueError(
        f"{name} is a thin variant, whose weights engines do not find. Make a full one of it: "
        f"`prunesid convert {name} --output FOLDER`."
    )


class BaseTokenizer:
    """What `AutoTokenizer` makes of a thin variant: the tokenizer of its base."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Nothing is registered: what is loaded is the base's."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args: Any, base_trust_remote_code: bool = False, **kwargs: Any):
        """
        Upstream's `AutoTokenizer.from_pretrained` of the base. See [`VariantProcessorMixin.from_pretrained`].

        Raises:
            `ValueError`: if `name` is no thin variant.
        """
        base, kwargs, fields = _locate(name, base_trust_remote_code, kwargs)
        if fields.get("base_model_name_or_path") is None:
            raise ValueError(f"{PROCESSOR_NAME} of {name} names no base_model_name_or_path. Save the variant again.")
        return _load_from_base(AutoTokenizer.from_pretrained, base, kwargs, *args)


def _location(kwargs: dict[str, Any]) -> dict[str, Any]:
    """How the variant's own files are found."""
    return {key: kwargs[key] for key in (*ACCESS_ARGUMENTS, "revision", "subfolder") if key in kwargs}


def _find_base(name: Any, config: Any, location: dict[str, Any]) -> str | None:
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


def _locate(name: Any, is_trusted: bool, kwargs: dict[str, Any]) -> tuple[Any, dict, dict]:
    """
    Where to load a part of a variant's processor from, and how: the name of the base of a thin variant, else the given
    one; the arguments for it; the fields of the variant.
    """
    fields = read_fields(name, PROCESSOR_NAME, _location(kwargs)) or {}
    base, revision = read_base(fields, PROCESSOR_NAME)
    if base is None:
        return name, kwargs, fields
    kwargs = {key: value for key, value in kwargs.items() if key not in VARIANT_ARGUMENTS}
    return base, {**kwargs, "revision": revision or "main", "trust_remote_code": is_trusted}, fields


def _load_from_base(load: Callable, base: str, kwargs: dict[str, Any], *args: Any) -> Any:
    try:
        return load(base, *args, **kwargs)
    except ValueError as error:
        if kwargs["trust_remote_code"] or "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(
            f"The base {base!r} of this thin variant has Python files of its own, which `trust_remote_code` does not "
            "run: it is said of the variant. Read them, and pass `base_trust_remote_code=True`."
        ) from error


def _check_family(base: str, config: PretrainedConfig, fields: dict[str, Any]) -> None:
    """The base must be a checkpoint of the same parts: `model_type` of the whole, of its tower and language model."""
    own = {getattr(base, "model_type", "") for base in type(config).__mro__} - {""}  # with that of the stock class
    if fields.get("model_type") in getattr(config, "_also_loads", ()):
        return
    parts = [("", own, fields)]
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


# What `hub.py` and `processing.py` call, also those of repos that an earlier release saved.
PARTS = SimpleNamespace(is_thin=is_thin, load_model=load_model, load_processor=load_processor, not_served=not_served)
