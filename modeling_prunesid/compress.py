"""`compress`: PruneSID for a stock model that is loaded already, whatever it was loaded with."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from .configuration_prunesid import NestsPruneSIDConfig
from .family import stock_class


def compress(model: Any, budget: int | float | None = 64, **settings: Any) -> Any:
    """
    Adds PruneSID to a stock model that is already loaded. The model changes its class in place; its modules and
    weights stay as they are. It may be quantised, dispatched over several devices, or wrapped by PEFT.

    Args:
        model (`PreTrainedModel` or `PeftModel`): of a declared family, with a language-modelling head.
        budget (`int`, `float` or `None`, defaults to 64):
            Tokens kept of each view, or their share, as in [`PruneSIDConfig`]. None restores the stock classes.
        settings: further fields of [`PruneSIDConfig`].

    Returns:
        `model`, the same object.

    Raises:
        `ValueError`: for a model of no declared family, or invalid settings; the model is then as it was.

    Example:
        ```python
        model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf", dtype="auto")
        compress(model, budget=64)
        ```
    """
    head = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(head, "_orig_mod", head)  # of `torch.compile`
    if budget is None:
        if settings:
            raise ValueError(f"budget=None gives the stock model back and takes no settings, got {settings}.")
        if _is_ours(head):
            stock = stock_class(type(head)), stock_class(type(head.model)), _stock_config(type(head).config_class)
            _swap(head, *stock)
            vars(head.config).pop("prunesid_config", None)
        return model

    ours = type(head) if _is_ours(head) else _class_for(head)
    prunesid_config = ours.config_class(prunesid_config={"budget": budget, **settings}).prunesid_config
    _swap(head, ours, getattr(ours, "model_class", ours), ours.config_class)
    head.config.prunesid_config = prunesid_config
    head.model._says_what_it_keeps = True
    return model


def _is_ours(head: Any) -> bool:
    is_stock = stock_class(type(head)) in (None, type(head))
    return not is_stock and type(head)._auto_class == "AutoModelForImageTextToText"


def _class_for(head: Any) -> type:
    from . import FAMILIES, family_class  # not at import, which is under way

    model_type = getattr(getattr(head, "config", None), "model_type", None)
    ours = family_class(model_type) if model_type in FAMILIES else None
    if ours is None or type(head) is not stock_class(ours):
        raise ValueError(
            "model must be a stock model with a language-modelling head, of a declared family "
            f"(modeling_prunesid.FAMILIES), got {type(head).__name__} (model_type={model_type!r})."
        )
    return ours


def _stock_config(ours: type) -> type:
    """The stock configuration that ours extends: PP-Chart2Table has one of its own, but the classes of GOT-OCR 2."""
    configs = [base for base in ours.__mro__ if issubclass(base, PretrainedConfig)]
    return next(base for base in configs if not issubclass(base, NestsPruneSIDConfig))


def _swap(head: PreTrainedModel, head_class: type, model_class: type, config_class: type) -> None:
    model = getattr(head, "model", head)  # where tower and language model are in one class, the head itself
    for module, cls in {head: head_class, model: model_class}.items():
        module.__class__ = cls
        if "_old_forward" in vars(module):  # Accelerate's hooks call this one
            module._old_forward = cls.forward.__get__(module)
    for config in (head.config, model.config):
        config.__class__ = config_class
        vars(config).pop("model_type", None)  # a loaded one has it beside its class
