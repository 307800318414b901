"""Settings of PruneSID, and the model configurations that carry them."""

import copy
import math
import numbers
import os
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig, __version__
from transformers.models.auto import modeling_auto

from .checks import PACKAGE, check_transformers, from_package
from .methods import DEFAULT_METHOD, check_method
from .parts import CARRIED, missing_part
from .upstream import CACHE_NAMES


check_transformers()

# Tables of Transformers in which pipelines and serving look up the names of classes with a head.
_CLASS_NAME_TABLES = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def register_class_names(config_class: type) -> None:
    """
    List the classes of a configuration where Transformers looks names up: `XForConditionalGeneration` and `XModel` of
    `XConfig`. It belongs into the configuration's file, because servers look before they import the modeling file. A
    table that a later version lacks is passed over.
    """
    family = config_class.__name__.removesuffix("Config")
    named = [(table, f"{family}ForConditionalGeneration") for table in _CLASS_NAME_TABLES]
    for table, name in (*named, ("MODEL_MAPPING_NAMES", f"{family}Model")):
        names = getattr(modeling_auto, table, None)
        if names is not None:
            names[config_class.model_type] = name


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
        of_none = "off" if name.endswith("budget") else "the model's budget; 1.0 keeps all"
        raise ValueError(
            f"{name} must be a positive integer (tokens kept of each encoded view), a float in (0, 1] (share of its "
            f"tokens) or None ({of_none}), got {value!r}. Write for example {name.split('.')[-1]}=64."
        )


def settings_of_preset(settings_class: type, name: Any, with_defaults: Callable = dict) -> Any:
    """The settings of a preset, by its name. `ValueError` without the package, which has presets."""
    presets = from_package("presets")
    if presets is None:
        raise ValueError(
            f"Presets come with the package {PACKAGE}, which is not installed. Install it, or give the settings "
            "themselves."
        )
    return presets.read_settings(settings_class, name, with_defaults)


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
    "budget_scope": _one_of("view", "image"),
    "dynamic": (lambda value: isinstance(value, bool), "True or False"),
    "reference_information": (
        lambda value: value is None or (is_number(value) and 0 < value <= 2),
        "a number in (0, 2] (the mean information score of a set of images) or None",
    ),
    "min_budget": optional_count(),
    "max_budget": optional_count(),
    "method": (lambda value: isinstance(value, str), "the name of a method, for example 'paper'"),
    "method_settings": (lambda value: value is None or isinstance(value, dict), "a dict or None"),
    "mrope_positions": _one_of("original", "contiguous"),
    "base_model_name_or_path": optional_name(),
    "base_model_revision": optional_name(),
}


class NestedSettings(PretrainedConfig):
    """Settings inside a model's configuration: a budget and fields with rules, checked at every assignment."""

    # field: (is it valid?, what is valid)
    _rules = {}
    # The preset that these settings were read from, so that a model of another type can refuse them. It is not saved.
    _preset: str | None = None

    @classmethod
    def from_preset(cls, name: str | os.PathLike):
        """
        The settings of a preset. `prunesid presets` lists them.

        Args:
            name (`str` or `os.PathLike`): for example `"llava_1.5_64"`, or the path of a JSON file.

        Raises:
            `ValueError`: if there is no such preset, with a list of those that exist; or if it is of another method.
        """
        return settings_of_preset(cls, name)

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

    @classmethod
    def _has(cls, name: str) -> bool:
        # Everything that Transformers itself gives a configuration is an attribute of the class, or one of these two.
        return name.startswith("_") or hasattr(cls, name) or name in ("attn_implementation", "experts_implementation")

    def _check_name(self, name):
        if not self._has(name):
            fields = ", ".join(sorted(["budget", *self._rules]))
            advice = "" if from_package("retired") else f" For those of version 0.1.0 install {PACKAGE}."
            raise ValueError(f"{self.base_config_key} has no field {name!r}. Its fields are: {fields}.{advice}")

    def check(self) -> None:
        """Raise a `ValueError` for fields that contradict each other. Runs at construction and before each use."""

    def to_dict(self) -> dict[str, Any]:
        """The settings alone, without the fields that Transformers gives to every configuration."""
        fields = {"budget": self.budget, **{name: getattr(self, name) for name in self._rules}}
        return {"model_type": self.model_type, "transformers_version": __version__, **fields}

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
            exact. A share of a view never stands for fewer tokens than `min_budget` either. In Qwen-VL it is 16 by
            default, so that a view of up to 16 tokens is left whole (release).
        method (`str`, defaults to `"paper"`, in a Hub repo to the one that it carries):
            How tokens are chosen: `"paper"`, as section 3 has it; `"release"`, as its authors' code does; `"spread"`
            (ours), by score and by the distance, projected as the language model gets them, to those already kept.
        method_settings (`dict`, *optional*):
            What belongs to one method. paper: `grouping` (`"psca"`, or `"kmeans"` and `"random"` of table 5) and
            `seed`. release: these, `score` (`"cls_attention"`, `"component"`, or ours: `"attention"`, the
            mean attention that a token receives in `layer`, for towers without CLS), `center` (`"features"` or
            `"tokens"`), `quota` (`"bounded"` or `"proportional"`) and `keep_cls`, whether CLS is one of the N. spread:
            `score`, `center` and `keep_cls`. All three: `question` (ours), whether the words of the question weigh the
            tokens: False, True, or `"keep"`, which lets a conversation on a cache go on with tokens that were chosen
            for an earlier question.
        mrope_positions (`"original"` or `"contiguous"`, defaults to `"original"`):
            For models with three-dimensional positions (Qwen-VL): every token keeps the position that it has in the
            full prompt, or the short prompt is numbered through like text. Other models always number it through.
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
    num_groups: int | None = None
    layer: int = -2
    nms_lambda: int | float | str | None = None
    dynamic: bool = False
    reference_information: int | float | None = None
    min_budget: int | None = None
    max_budget: int | None = None
    method: str = DEFAULT_METHOD
    method_settings: dict | None = None
    mrope_positions: str = "original"
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __post_init__(self, **kwargs):
        retired = None if all(map(self._has, kwargs)) else from_package("retired")
        super().__post_init__(**(kwargs if retired is None else retired.renew(self, kwargs)))

    def check(self) -> None:
        check_method(self.method, self.method_settings)
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
        if self.dynamic and not CARRIED["dynamic"]:
            raise missing_part("prunesid_config.dynamic=True")
        if self.dynamic and self.budget_scope == "view" and self.reference_information is None:
            raise ValueError(
                "prunesid_config.dynamic=True needs reference_information, the mean information score of typical "
                "images, got None. `prunesid calibrate` measures it."
            )


def as_own(fields: dict[str, Any], config_class: type, checkpoint: Any) -> dict[str, Any]:
    """
    The fields of a checkpoint's `config.json` with the `model_type` of `config_class`, whose stock model it is.

    Raises:
        `ValueError`: if it is a checkpoint of another model, with the class that loads it.
    """
    given, own = fields.get("model_type"), config_class.model_type
    if given in (None, own):
        return fields
    stock, *_ = known = [
        base.model_type for base in config_class.__mro__[1:] if issubclass(base, PretrainedConfig) and base.model_type
    ]
    bare = given.removeprefix("prunesid_").removeprefix("layer_pruned_").removeprefix("vitcop_")
    if bare in (*known, *getattr(config_class, "_also_loads", ())):  # a stock configuration may extend another one
        return {**fields, "model_type": own}
    family, families = config_class.__name__.removesuffix("Config"), from_package("families")
    advice = families.advise_class(bare) if families else "Load it with AutoModelForImageTextToText."
    raise ValueError(
        f"{checkpoint} is a checkpoint of model_type {given!r}, and {family} classes load those of {stock!r}. {advice}"
    )


def ignored_at_inference(config_class: type) -> list[str]:
    """The fields of outputs that `Trainer` leaves out of predictions, for it takes tensors alone."""
    stock = getattr(config_class, "keys_to_ignore_at_inference", [])  # empty for all classes in Transformers 5.18
    ours = [*CACHE_NAMES, "keep_mask", "layer_visual_tokens", "image_outputs", "video_outputs"]
    return list(dict.fromkeys([*stock, *ours]))


def read_settings(
    value: Any, settings_class: type, current: Any, model_type: str, with_defaults: Callable = dict
) -> Any:
    """
    What is assigned to a model's `prunesid_config` as settings: those of a dict or of a preset by its name; for None
    the defaults where there are none yet, else the current ones with the budget None. `ValueError` for a preset that
    is for models of another type.
    """
    if value is None and current is not None:
        settings = copy.deepcopy(current)
        settings.budget = None
        return settings
    settings = value
    if value is None or isinstance(value, dict):
        settings = settings_class(**with_defaults(value or {}))
    elif isinstance(value, str):
        settings = settings_of_preset(settings_class, value, with_defaults)
    for name in ("base_model_name_or_path", "base_model_revision"):
        if getattr(current, name, None) is not None and getattr(settings, name) is None:
            setattr(settings, name, getattr(current, name))
    if getattr(settings, "_preset", None) is not None:
        from_package("presets").check_model_type(settings._preset, model_type)
    return settings


def without_none(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None or name not in names}


class NestsPruneSIDConfig:
    """
    Mixin of the model configurations, which gives them the field `prunesid_config` (`dict`, `PruneSIDConfig` or the
    name of a preset, *optional*): how visual tokens are chosen. A dict passed to `from_pretrained` is merged into the
    saved one, and None leaves it as it was saved. Set to None later, the budget is None: off.
    """

    _settings_class = PruneSIDConfig
    # Further model types of checkpoints that the stock class of this family loads.
    _also_loads: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs):
        if not issubclass(cls, PretrainedConfig):  # a mixin of several families
            return super().__init_subclass__(**kwargs)
        cls.__annotations__ = {
            **vars(cls).get("__annotations__", {}),
            "prunesid_config": dict | str | PretrainedConfig | None,
        }
        cls.prunesid_config = None
        super().__init_subclass__(**kwargs)
        strict(cls)
        cls.keys_to_ignore_at_inference = ignored_at_inference(cls)
        register_class_names(cls)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Upstream's. A stock checkpoint is one of ours; see [`as_own`]."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return as_own(fields, cls, pretrained_model_name_or_path), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Upstream's, with `prunesid_config=None` for the saved settings."""
        return super().from_dict(config_dict, **without_none(kwargs, "prunesid_config"))

    def __setattr__(self, name, value):
        if name != "prunesid_config":
            return super().__setattr__(name, value)
        before, is_given = vars(self).get(name), value is not None
        value = read_settings(value, self._settings_class, before, self.model_type, self._with_defaults)
        super().__setattr__(name, value)
        try:
            if is_given:  # the method of a repo may fit its family with other settings than the defaults alone
                self.check_settings()
        except ValueError:
            if before is not None:  # what is refused changes nothing
                super().__setattr__(name, before)
            raise

    def check_settings(self) -> None:
        """Raise a `ValueError` for settings that this family cannot follow. Runs before each use as well."""
        self.prunesid_config.check()

    def _with_defaults(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, with the family's where the caller gives none."""
        return settings


__all__ = ["PruneSIDConfig"]
