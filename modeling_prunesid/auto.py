"""The class of a stock checkpoint's family, found by its `model_type`. It does not travel with a repo."""

import importlib
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .families import FAMILIES, UNSUPPORTED


_ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")


def head_of(model_type: str) -> Any:
    """
    Our class with a language-modelling head for a stock `model_type`, or for one of ours (`prunesid_<model_type>`).

    Raises:
        `ValueError`: for a model type that the mechanism does not fit, or that no family is declared for.
        `AttributeError`: if the installed Transformers lacks it.
    """
    name = FAMILIES.get(model_type.removeprefix("prunesid_"))
    if name is None:
        reason = UNSUPPORTED.get(model_type)
        if reason is not None:
            raise ValueError(f"PruneSID does not fit model_type={model_type!r}: {reason}. Use the stock class.")
        advice = "docs/new_family.md declares one" if model_type in CONFIG_MAPPING_NAMES else "Check the name"
        raise ValueError(
            f"No PruneSID family is declared for model_type={model_type!r}. {advice}; the families are: "
            f"{', '.join(FAMILIES)}."
        )
    return getattr(importlib.import_module(__package__), f"PruneSID{name}ForConditionalGeneration")


class PruneSIDForImageTextToText:
    """
    Loads a checkpoint of any declared family into its PruneSID class, which it finds by the checkpoint's `model_type`.
    It is used as `AutoModelForImageTextToText` is for stock classes.
    """

    def __init__(self):
        raise OSError(f"{type(self).__name__} is made by `from_pretrained(name)` or `from_config(config)`.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, prunesid_config=None, **kwargs: Any):
        """
        `from_pretrained` of the family that the checkpoint's `model_type` names.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a stock checkpoint, or a variant of ours.
            prunesid_config (`dict` or `PruneSIDConfig`, *optional*): how visual tokens are chosen.
            args, kwargs: those of upstream's `from_pretrained`.

        Raises:
            `ValueError`: for a model type that does not fit or is not declared.
        """
        config = kwargs.get("config")
        if isinstance(config, PretrainedConfig):
            model_type = config.model_type
        else:
            access = {name: kwargs[name] for name in _ACCESS if name in kwargs}
            fields, _ = PretrainedConfig.get_config_dict(config or pretrained_model_name_or_path, **access)
            model_type = fields.get("model_type", "")
        if prunesid_config is not None:
            kwargs["prunesid_config"] = prunesid_config
        return head_of(model_type).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, prunesid_config=None, **kwargs: Any):
        """A random model of the family of a stock configuration, or of one of ours."""
        head = head_of(config.model_type)
        if type(config) is not head.config_class:
            fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
            config = head.config_class(**fields, prunesid_config=prunesid_config)
        return head._from_config(config, **kwargs)
