"""Settings of PruneSID, and the model configurations that carry them."""

import math
import numbers
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    VideoLlavaConfig,
)


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_budget(value: Any) -> bool:
    is_count = is_integer(value) and value >= 1
    is_share = is_number(value) and not is_integer(value) and 0 < value <= 1
    return value is None or is_count or is_share


def check_budget(value: Any, name: str = "prunesid_config.budget") -> None:
    """Raise a `ValueError` unless `value` is a count of tokens, a share of them, or None."""
    if not is_budget(value):
        raise ValueError(
            f"{name} must be a positive integer (tokens kept of each encoded view), a float in (0, 1] (share of its "
            f"tokens) or None (off), got {value!r}. Write for example {name.split('.')[-1]}=64."
        )


def _one_of(*choices: str):
    return lambda value: value in choices, "one of " + ", ".join(repr(choice) for choice in choices)


def optional_count():
    return lambda value: value is None or (is_integer(value) and value >= 1), "a positive integer or None"


def optional_name():
    return lambda value: value is None or (isinstance(value, str) and value != ""), "a non-empty string or None"


# field: (is it valid?, what is valid)
_RULES = {
    "num_groups": optional_count(),
    "layer": (is_integer, "an integer index into the tower's hidden states, for example -2"),
    "nms_lambda": (
        lambda value: value is None or value == "auto" or (is_number(value) and value > 0),
        "a positive number, 'auto' or None (N/32)",
    ),
    "llm_budget": (is_budget, "a positive integer, a float in (0, 1] or None"),
    "budget_scope": _one_of("view", "image"),
    "dynamic": (lambda value: isinstance(value, bool), "True or False"),
    "reference_information": (
        lambda value: value is None or (is_number(value) and 0 < value <= 2),
        "a number in (0, 2] (the mean information score of a set of images) or None",
    ),
    "min_budget": optional_count(),
    "max_budget": optional_count(),
    "score": _one_of("component", "cls_attention"),
    "center": _one_of("tokens", "features"),
    "quota": _one_of("proportional", "bounded", "spread"),
    "keep_cls": (lambda value: isinstance(value, bool), "True or False"),
    "grouping": _one_of("psca", "kmeans", "random"),
    "mrope_positions": _one_of("original", "contiguous"),
    "seed": (lambda value: is_integer(value) and value >= 0, "an integer of at least 0"),
    "base_model_name_or_path": optional_name(),
    "base_model_revision": optional_name(),
}


class NestedSettings(PretrainedConfig):
    """Settings inside a model's configuration: a budget and fields with rules, checked at every assignment."""

    # field: (is it valid?, what is valid)
    _rules = {}

    def __post_init__(self, **kwargs):
        for name in kwargs:
            self._check_name(name)
        super().__post_init__(**kwargs)
        self.check()

    def __setattr__(self, name, value):
        self._check_name(name)
        if name == "budget":
            check_budget(value, name=f"{self.base_config_key}.budget")
        elif name in self._rules:
            is_valid, description = self._rules[name]
            if not is_valid(value):
                raise ValueError(f"{self.base_config_key}.{name} must be {description}, got {value!r}.")
        super().__setattr__(name, value)

    def _check_name(self, name):
        # Everything that Transformers itself gives a configuration is an attribute of the class, or one of these two.
        known = name.startswith("_") or hasattr(type(self), name)
        if not known and name not in ("attn_implementation", "experts_implementation"):
            fields = ", ".join(sorted(["budget", *self._rules]))
            raise ValueError(f"{self.base_config_key} has no field {name!r}. Its fields are: {fields}.")

    def check(self) -> None:
        """Raise a `ValueError` for fields that contradict each other. Runs at construction and before each use."""

    def to_dict(self) -> dict[str, Any]:
        """The settings alone, without the fields that Transformers gives to every configuration."""
        fields = {"budget": self.budget, **{name: getattr(self, name) for name in self._rules}}
        return {"model_type": self.model_type, "transformers_version": transformers.__version__, **fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PruneSIDConfig(NestedSettings):
    r"""
    How visual tokens are chosen (PruneSID, ICLR 2026). The defaults are the paper's settings for LLaVA-1.5.

    Args:
        budget (`int`, `float` or `None`, defaults to 64):
            N. An int is the number of tokens kept of each encoded view (image, crop or frame); a float in (0, 1] is
            the share kept; None switches compression off. A budget of at least the view's own tokens is off as well.
        budget_scope (`"view"` or `"image"`, defaults to `"view"`):
            What an int or a share counts: the tokens of each encoded view, or the total of a whole image or clip (the
            crops of LLaVA-NeXT, the frames of Video-LLaVA), which is shared over its views: equally, or with `dynamic`
            in proportion to their information scores. A total is exact, so that prompts can be sized up front.
        llm_budget (`int` or `float`, *optional*):
            LLaVA-1.5 only (ours): the mean number of visual tokens of an image over the layers of the language model,
            as a count or a share of its tokens. The N that enter are thinned out in front of two of its layers, by the
            norms of their keys as in ViTCoP. None drops nothing there.
        num_groups (`int`, *optional*):
            K, the number of PSCA groups. Default: N/4 (section 4.3, table 6).
        layer (`int`, defaults to -2):
            Index into the vision tower's hidden states of the features that tokens are compared by (figure 4).
        nms_lambda (`float` or `"auto"`, *optional*):
            Scale of the NMS threshold tau = lambda * rho. Default: N/32 (section 3.3), tuned for CLIP towers. `"auto"`
            (ours) takes the smallest threshold of each image at which NMS leaves at least N tokens.
        dynamic (`bool`, defaults to `False`):
            Give each image N' = N * phi / `reference_information` tokens, where phi = 1 - rho is its information score
            (section 3.4, equation 7).
        reference_information (`float`, *optional*):
            The mean information score over a set of typical images; the mean budget over that set is then N. Required
            by `dynamic` with `budget_scope="view"`.
        min_budget, max_budget (`int`, *optional*):
            Bounds of the dynamic budget of a view, in tokens; none with `budget_scope="image"`, whose totals are
            exact. In Qwen-VL, where `min_budget` is 16 by default, a share never stands for fewer tokens than it
            either, so that a view of up to 16 tokens is left whole (release).
        score (`"component"` or `"cls_attention"`, defaults to `"component"`):
            What ranks the tokens of a group: |V| of equation 3, or the attention that the CLS token pays (the authors'
            release).
        center (`"tokens"` or `"features"`, defaults to `"tokens"`):
            Axis whose mean is removed before the decomposition: over tokens (equation 1), or over features (release).
        quota (`"proportional"`, `"bounded"` or `"spread"`, defaults to `"proportional"`):
            Group quotas: proportional to the survivors (section 3.3), or bounded from below and above (release).
            `"spread"` (ours) takes neither groups nor NMS into account: tokens follow by score and by the distance,
            projected as the language model gets them, to those already kept. All tokens are projected for it.
        keep_cls (`bool`, defaults to `False`):
            Let the tower's CLS token be one of the N (release).
        grouping (`"psca"`, `"kmeans"` or `"random"`, defaults to `"psca"`):
            How tokens are grouped (table 5).
        mrope_positions (`"original"` or `"contiguous"`, defaults to `"original"`):
            For models with three-dimensional positions (Qwen-VL): every token keeps the position that it has in the
            full prompt, or the short prompt is numbered through like text. Other models always number it through.
        seed (`int`, defaults to 0):
            Seed of the random grouping and of the start of k-means.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            The checkpoint that a thin variant, which has no weights of its own, takes them from.

    Raises:
        `ValueError`: for an unknown name or an invalid value, at construction and at every later assignment.
    """

    model_type = "prunesid"
    base_config_key = "prunesid_config"
    _rules = _RULES

    budget: int | float | None = 64
    budget_scope: str = "view"
    llm_budget: int | float | None = None
    num_groups: int | None = None
    layer: int = -2
    nms_lambda: int | float | str | None = None
    dynamic: bool = False
    reference_information: int | float | None = None
    min_budget: int | None = None
    max_budget: int | None = None
    score: str = "component"
    center: str = "tokens"
    quota: str = "proportional"
    keep_cls: bool = False
    grouping: str = "psca"
    mrope_positions: str = "original"
    seed: int = 0
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def check(self) -> None:
        if self.min_budget is not None and self.max_budget is not None and self.min_budget > self.max_budget:
            raise ValueError(
                f"prunesid_config.min_budget={self.min_budget} exceeds max_budget={self.max_budget}. Swap them."
            )
        bounds = (self.min_budget, self.max_budget)
        if self.budget_scope == "image" and bounds != (None, None):
            raise ValueError(
                "prunesid_config.min_budget and max_budget bound the budget of a view, but budget_scope='image' fixes "
                f"the total, got min_budget={self.min_budget}, max_budget={self.max_budget}. Set both to None."
            )
        if isinstance(self.budget, int) and isinstance(self.llm_budget, int) and self.llm_budget > self.budget:
            raise ValueError(
                f"prunesid_config.llm_budget={self.llm_budget}, the mean over the layers, exceeds "
                f"budget={self.budget}, the tokens that enter them. Raise budget, or lower llm_budget."
            )
        if self.dynamic and self.budget_scope == "view" and self.reference_information is None:
            raise ValueError(
                "prunesid_config.dynamic=True needs reference_information, the mean information score of typical "
                "images, got None. `scripts/calibrate.py` measures it."
            )


def ignored_at_inference(config_class: type) -> list[str]:
    """The fields of outputs that `Trainer` leaves out of predictions, for it takes tensors alone."""
    stock = getattr(config_class, "keys_to_ignore_at_inference", ["past_key_values", "cache"])
    return list(dict.fromkeys([*stock, "keep_mask", "layer_visual_tokens", "image_outputs", "video_outputs"]))


class NestsPruneSIDConfig:
    """Mixin of the model configurations: `prunesid_config` may be assigned as a dict, None or a `PruneSIDConfig`."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.keys_to_ignore_at_inference = ignored_at_inference(cls)
        cls.sub_configs = {**getattr(cls, "sub_configs", {}), "prunesid_config": PruneSIDConfig}

    # Whether tokens may also be dropped inside the language model.
    _has_llm_budget = False

    def __setattr__(self, name, value):
        if name == "prunesid_config" and (value is None or isinstance(value, dict)):
            value = PruneSIDConfig(**(value or {}))
        super().__setattr__(name, value)
        if name == "prunesid_config" and value.llm_budget is not None and not self._has_llm_budget:
            raise ValueError(
                f"prunesid_config.llm_budget must be None for {self.model_type}, got {value.llm_budget!r}: only "
                "prunesid_llava drops tokens inside the language model."
            )


@strict
class PruneSIDLlavaConfig(NestsPruneSIDConfig, LlavaConfig):
    r"""
    [`LlavaConfig`] with a nested [`PruneSIDConfig`].

    Args:
        prunesid_config (`dict` or `PruneSIDConfig`, *optional*):
            How visual tokens are chosen. A dict passed to `from_pretrained` is merged into the saved one.
    """

    model_type = "prunesid_llava"
    _has_llm_budget = True

    prunesid_config: dict | PretrainedConfig | None = None


@strict
class PruneSIDLlavaNextConfig(NestsPruneSIDConfig, LlavaNextConfig):
    r"""
    [`LlavaNextConfig`] with a nested [`PruneSIDConfig`].

    Args:
        prunesid_config (`dict` or `PruneSIDConfig`, *optional*):
            How visual tokens are chosen; the budget is that of each crop, or with `budget_scope="image"` of the whole
            image. A dict passed to `from_pretrained` is merged into the saved one.
    """

    model_type = "prunesid_llava_next"

    prunesid_config: dict | PretrainedConfig | None = None


@strict
class PruneSIDVideoLlavaConfig(NestsPruneSIDConfig, VideoLlavaConfig):
    r"""
    [`VideoLlavaConfig`] with a nested [`PruneSIDConfig`].

    Args:
        prunesid_config (`dict` or `PruneSIDConfig`, *optional*):
            How visual tokens are chosen; the budget is that of each image and frame, or with `budget_scope="image"` of
            each image and clip. A dict passed to `from_pretrained` is merged into the saved one.
    """

    model_type = "prunesid_video_llava"

    prunesid_config: dict | PretrainedConfig | None = None


class _QwenVLDefaults:
    """Mixin: images have any number of tokens, so that the budget is a share; and the towers have no CLS token."""

    def __setattr__(self, name, value):
        if name == "prunesid_config" and (value is None or isinstance(value, dict)):
            value = {"budget": 1 / 3, **(value or {})}
            if value.get("budget_scope") != "image":
                value = {"min_budget": 16, **value}
        super().__setattr__(name, value)
        if name == "prunesid_config":
            refuse_cls(self.prunesid_config)


def refuse_cls(settings: PretrainedConfig, reason: str = "its vision tower has no CLS token") -> None:
    """Raise a `ValueError` for settings that need a CLS token, of a model that has none to give."""
    for name, refused, instead in (("score", "cls_attention", "component"), ("keep_cls", True, False)):
        if getattr(settings, name) == refused:
            raise ValueError(f"prunesid_config.{name} must be {instead!r} for this model, got {refused!r}: {reason}.")


@strict
class PruneSIDQwen2VLConfig(_QwenVLDefaults, NestsPruneSIDConfig, Qwen2VLConfig):
    r"""
    [`Qwen2VLConfig`] with a nested [`PruneSIDConfig`].

    Args:
        prunesid_config (`dict` or `PruneSIDConfig`, *optional*):
            How visual tokens are chosen; the budget is that of each image and of each temporal slice of a video, or
            with `budget_scope="image"` of each image and video. By default a third of the tokens, and at least 16.
            `layer` has no meaning here: tokens are compared as they leave the patch merger. A dict passed to
            `from_pretrained` is merged into the saved one.
    """

    model_type = "prunesid_qwen2_vl"

    prunesid_config: dict | PretrainedConfig | None = None


@strict
class PruneSIDQwen2_5_VLConfig(_QwenVLDefaults, NestsPruneSIDConfig, Qwen2_5_VLConfig):
    r"""
    [`Qwen2_5_VLConfig`] with a nested [`PruneSIDConfig`].

    Args:
        prunesid_config (`dict` or `PruneSIDConfig`, *optional*): See [`PruneSIDQwen2VLConfig`].
    """

    model_type = "prunesid_qwen2_5_vl"

    prunesid_config: dict | PretrainedConfig | None = None


@strict
class PruneSIDQwen3VLConfig(_QwenVLDefaults, NestsPruneSIDConfig, Qwen3VLConfig):
    r"""
    [`Qwen3VLConfig`] with a nested [`PruneSIDConfig`].

    Args:
        prunesid_config (`dict` or `PruneSIDConfig`, *optional*): See [`PruneSIDQwen2VLConfig`].
    """

    model_type = "prunesid_qwen3_vl"

    prunesid_config: dict | PretrainedConfig | None = None


__all__ = [
    "PruneSIDConfig",
    "PruneSIDLlavaConfig",
    "PruneSIDLlavaNextConfig",
    "PruneSIDQwen2VLConfig",
    "PruneSIDQwen2_5_VLConfig",
    "PruneSIDQwen3VLConfig",
    "PruneSIDVideoLlavaConfig",
]
