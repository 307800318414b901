"""What lets Auto classes, pipelines and the Hub treat our classes as they treat the stock ones."""

import os
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import resolve_revision

from .checks import PACKAGE, from_package
from .parts import THIN, missing_thin


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
        revision = None if kwargs.get("revision") in (None, "main") else str(kwargs["revision"])
        if THIN is not None and THIN.is_thin(name, config, kwargs):
            load = super().from_pretrained
            loaded, source = THIN.load_model(cls, load, name, model_args, config, base_trust_remote_code, kwargs)
        else:
            try:
                loaded, source = super().from_pretrained(name, *model_args, config=config, **kwargs), (name, revision)
            except OSError as error:
                if THIN is None and cls._read_config(name, config, kwargs).prunesid_config.base_model_name_or_path:
                    raise missing_thin(name) from error
                raise
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.loaded_revision = revision
        model._remember_source(*source, kwargs.get("cache_dir"))
        return loaded

    @classmethod
    def _read_config(cls, name: Any, config: Any, kwargs: dict[str, Any]) -> PretrainedConfig:
        if isinstance(config, PretrainedConfig):
            return config
        return cls.config_class.from_pretrained(name if config is None else config, **kwargs)

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

    def _remember_source(self, name: str | os.PathLike | None, revision: str | None, cache_dir: Any) -> None:
        """Keep the commit that was just loaded, which a branch may leave behind until the model is saved."""
        found = resolve_revision(name, revision, cache_dir=cache_dir, local_files_only=True)
        source = {"revision": getattr(found, "resolved", revision)}
        self._sources = {(str(name), revision): source if cache_dir is None else {**source, "cache_dir": cache_dir}}

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
        publishing = from_package("publishing")
        if publishing is None:
            _refuse(thin)
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
        publishing = from_package("publishing")
        if publishing is None:
            _refuse(thin)
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


def _refuse(thin: bool) -> None:
    if thin:
        raise ImportError(
            f"thin=True needs the package {PACKAGE}, which is not installed: a repo carries only what runs its model. "
            "Install it, or save the model with its weights (thin=False)."
        )
