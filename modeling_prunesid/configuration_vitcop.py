"""Settings of ViTCoP, and the model configuration that carries them."""

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PretrainedConfig

from .configuration_prunesid import (
    NestedSettings,
    ignored_at_inference,
    is_integer,
    is_number,
    optional_count,
    optional_name,
)


def _optional_share():
    return lambda value: value is None or (is_number(value) and 0 < value <= 1), "a number in (0, 1] or None"


class ViTCoPConfig(NestedSettings):
    r"""
    How many visual tokens ViTCoP leaves (arXiv 2601.17818). The defaults are the paper's settings for LLaVA-1.5 at a
    mean of 64 tokens, and follow the budget and the depth of the language model.

    Args:
        budget (`int`, `float` or `None`, defaults to 64):
            The mean number of visual tokens of an image over the layers of the language model; a float in (0, 1] is
            the share of all its tokens; None, or at least all tokens, switches compression off.
        keep_share (`float`, *optional*):
            V, the share of the tokens that stage I keeps and that enter the language model. Default: 0.2 + 0.9 P for a
            budget of the share P, the line through the published 0.3, 0.4 and 0.5 at P = 1/9, 2/9 and 1/3. For smaller
            budgets and language models of few layers, as many as let stage II keep 77 of 172, as at P = 1/9.
        center_share (`float`, *optional*):
            p, cluster centres as a share of the tokens that stage I keeps. Default: 0.09 + 0.27 P (published: 0.12,
            0.15, 0.18).
        layer (`int`, defaults to -2):
            Index into the vision tower's hidden states of the layer whose CLS attention and keys stage I uses.
        merge_layer (`int`, *optional*):
            S, the layer of the language model that stage II runs in front of. Default: 2 of 32, at the same depth of
            others: `round(L / 16)`, at least 1.
        prune_layer (`int`, *optional*):
            D, the layer that stage III runs in front of; L switches it off. Default: 22 of 32, `round(11 L / 16)`.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            The checkpoint that a thin variant, which has no weights of its own, takes them from.

    Raises:
        `ValueError`: for an unknown name or an invalid value, at construction and at every later assignment.
    """

    model_type = "vitcop"
    base_config_key = "vitcop_config"
    _rules = {
        "keep_share": _optional_share(),
        "center_share": _optional_share(),
        "layer": (is_integer, "an integer index into the tower's hidden states, for example -2"),
        "merge_layer": optional_count(),
        "prune_layer": optional_count(),
        "base_model_name_or_path": optional_name(),
        "base_model_revision": optional_name(),
    }

    budget: int | float | None = 64
    keep_share: int | float | None = None
    center_share: int | float | None = None
    layer: int = -2
    merge_layer: int | None = None
    prune_layer: int | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None


@strict
class ViTCoPLlavaConfig(LlavaConfig):
    r"""
    [`LlavaConfig`] with a nested [`ViTCoPConfig`], which also answers to the name `prunesid_config`.

    Args:
        vitcop_config (`dict` or `ViTCoPConfig`, *optional*):
            How many visual tokens are left. A dict passed to `from_pretrained` is merged into the saved one.
    """

    model_type = "vitcop_llava"
    attribute_map = {**LlavaConfig.attribute_map, "prunesid_config": "vitcop_config"}
    sub_configs = {**LlavaConfig.sub_configs, "vitcop_config": ViTCoPConfig}
    keys_to_ignore_at_inference = ignored_at_inference(LlavaConfig)

    vitcop_config: dict | PretrainedConfig | None = None

    def __setattr__(self, name, value):
        if name == "vitcop_config" and (value is None or isinstance(value, dict)):
            value = ViTCoPConfig(**(value or {}))
        super().__setattr__(name, value)


__all__ = ["ViTCoPConfig", "ViTCoPLlavaConfig"]
