"""What lets Auto classes, pipelines and the Hub treat our classes as they treat the stock ones."""

import importlib
import os
from types import ModuleType
from typing import Any

from huggingface_hub import CommitInfo
from transformers import GenerationConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from .repo_files import ACCESS_ARGUMENTS, VARIANT_ARGUMENTS, find_commit, read_base, read_fields


_DYNAMIC_MODULES = "transformers_modules."


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
        Upstream's `save_pretrained`, with the code for every Auto class. Where our package is installed, also with the
        processor of the checkpoint that the model was loaded from, and a model card.

        Args:
            thin (`bool`, defaults to `False`):
                Leave the weights out and name the base that they are loaded from: the checkpoint that this model came
                from, or `prunesid_config.base_model_name_or_path`, at the commit that was loaded. Every weight is
                compared with the base's, whose files are read once for it; those that are quantised cannot be, and
                are taken to be the base's.

        Raises:
            `ImportError`: if `thin` and our package is not installed: a repo does not carry what publishes it.
            `ValueError`: if `save_directory` is a file; if `thin` and no base is known, a weight is not the base's
                (trained, merged with an adapter, resized), the folder holds weights already, or the model has an
                adapter.
            `OSError`: if `thin` and the base's weights cannot be read.
        """
        publishing = _find_publishing(is_needed=thin)
        if publishing is None:
            self.config.auto_map = self.own_auto_map()
            super().save_pretrained(save_directory, is_main_process, push_to_hub=push_to_hub, **kwargs)
            return
        publishing.save_variant(
            self, super().save_pretrained, save_directory, is_main_process, push_to_hub, thin, **kwargs
        )

    def push_to_hub(self, repo_id: str, *, thin: bool = False, **kwargs: Any) -> CommitInfo:
        r"""
        Upstream's `push_to_hub` of all that [`~HubModelMixin.save_pretrained`] writes. Where our package is installed
        it is a single commit, so that an interrupted upload publishes nothing.

        Args:
            thin (`bool`, defaults to `False`):
                Leave the weights out; see [`~HubModelMixin.save_pretrained`].

        Raises:
            `ImportError`: if `thin` and our package is not installed.
            `ValueError`: if `thin` and the base is a folder of this machine, which nobody else can load.
        """
        publishing = _find_publishing(is_needed=thin)
        if publishing is None:
            return super().push_to_hub(repo_id, **kwargs)
        return publishing.push_variant(self, repo_id, thin=thin, **kwargs)

    def own_auto_map(self) -> dict[str, str]:
        """The `auto_map` of a repo with this model's code, without an entry for the processor."""
        config_class, module = type(self.config), type(self).__module__.rsplit(".", 1)[-1]
        return {
            "AutoConfig": f"{config_class.__module__.rsplit('.', 1)[-1]}.{config_class.__name__}",
            **{auto_class: f"{module}.{name}" for auto_class, name in self._auto_map.items()},
        }


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


def _find_publishing(is_needed: bool) -> ModuleType | None:
    """What publishes variants. It stays in the package, so that who runs a repo has less to read; None without it."""
    try:
        return importlib.import_module("modeling_prunesid.publishing")
    except ImportError as error:
        if not is_needed:
            return None
        raise ImportError(
            "thin=True needs the package prunesid-transformers, which is not installed: a repo carries only what runs "
            "its model. Install it, or save the model with its weights (thin=False)."
        ) from error


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


def _has_weights(name: str | os.PathLike, location: dict[str, Any]) -> bool:
    return any(
        cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location) is not None
        for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )


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
