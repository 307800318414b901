"""
Processors that write short prompts: one placeholder for each kept token.

A fixed budget is known before any image is seen, so engines that size prompts up front, static caches and exporters
can have prompts of the final length. For a dynamic budget they write the full prompt, which the models accept as well.
"""

import inspect
import os
from typing import Any

from transformers import AutoTokenizer, LlavaProcessor, PretrainedConfig
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs
from transformers.utils import PROCESSOR_NAME

from .configuration_prunesid import check_budget
from .hub_prunesid import ACCESS_ARGUMENTS, VARIANT_ARGUMENTS, read_base, read_fields
from .selection_prunesid import resolve_budget


class PruneSIDImagesKwargs(ImagesKwargs, total=False):
    """
    num_visual_tokens (`int` or `float`, *optional*):
        Tokens kept of each image, or their share, in place of the processor's own.
    """

    num_visual_tokens: int | float | None


class PruneSIDLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: PruneSIDImagesKwargs
    _defaults = getattr(LlavaProcessor.valid_processor_kwargs, "_defaults", {})


def _locate(name: str | os.PathLike, is_trusted: bool, kwargs: dict[str, Any]) -> tuple[Any, dict, dict]:
    """
    Where to load a part of a variant's processor from, and how.

    Returns:
        name of the base of a thin variant, else the given one; the arguments for it; the fields of the variant.
    """
    location = {key: kwargs[key] for key in (*ACCESS_ARGUMENTS, "revision", "subfolder") if key in kwargs}
    fields = read_fields(name, PROCESSOR_NAME, location) or {}
    base, revision = read_base(fields, PROCESSOR_NAME)
    if base is None:
        return name, kwargs, fields
    kwargs = {key: value for key, value in kwargs.items() if key not in VARIANT_ARGUMENTS}
    return base, {**kwargs, "revision": revision or "main", "trust_remote_code": is_trusted}, fields


def _load_from_base(load: Any, base: str, kwargs: dict[str, Any], *args: Any) -> Any:
    try:
        return load(base, *args, **kwargs)
    except ValueError as error:
        if kwargs["trust_remote_code"] or "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(
            f"The base {base!r} of this thin variant has Python files of its own, which `trust_remote_code` does not "
            "run: it is said of the variant. Read them, and pass `base_trust_remote_code=True`."
        ) from error


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


class VariantProcessorMixin:
    """For a processor that is published with a model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, base_trust_remote_code: bool = False, **kwargs):
        """
        Upstream's `from_pretrained`. That of a thin variant is its base's processor with the variant's budget;
        `revision`, `subfolder` and `trust_remote_code` are said of the variant alone. None is the saved budget.

        Args:
            base_trust_remote_code (`bool`, defaults to `False`):
                Also run Python files of the base of a thin variant, where its tokenizer or image processor has some.

        Raises:
            `ValueError`: if the base needs Python files of its own, or `processor_config.json` of the variant does not
                hold what it should.
        """
        names = cls._budget_arguments()
        kwargs = {name: value for name, value in kwargs.items() if name not in names or value is not None}
        name, arguments, fields = _locate(pretrained_model_name_or_path, base_trust_remote_code, kwargs)
        if arguments is kwargs:
            processor = super().from_pretrained(name, **kwargs)
        else:
            saved = {key: fields[key] for key in names if key in fields}
            processor = _load_from_base(super().from_pretrained, name, {**saved, **arguments})
        # Upstream hands a processor's arguments to its tokenizer too, whose copy would outrank what is set later.
        for name in names:
            processor.tokenizer.init_kwargs.pop(name, None)
        return processor

    @classmethod
    def arguments_for(cls, settings: PretrainedConfig) -> dict:
        """The arguments of a processor that fits a model with these settings (`PruneSIDConfig`)."""
        varies = settings.dynamic and settings.budget_scope == "view"
        values = {"num_visual_tokens": None if varies else settings.budget, "budget_scope": settings.budget_scope}
        return {name: values[name] for name in cls._budget_arguments()}

    @classmethod
    def _budget_arguments(cls) -> list[str]:
        parameters = inspect.signature(cls.__init__).parameters
        return [name for name in ("num_visual_tokens", "budget_scope") if name in parameters]


class ShortPromptProcessorMixin(VariantProcessorMixin):
    """For a processor whose `replace_image_token` writes T placeholders for an image."""

    def _num_kept(self, num_tokens: int, num_visual_tokens: int | float | None) -> int:
        budget = self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        check_budget(budget, name="num_visual_tokens")
        return num_tokens if budget is None else resolve_budget(budget, num_tokens)

    def replace_image_token(
        self, image_inputs: dict, image_idx: int, num_visual_tokens: int | float | None = None, **kwargs
    ) -> str:
        text = super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.image_token * self._num_kept(text.count(self.image_token), num_visual_tokens)

    def _process_images(self, images, num_visual_tokens: int | float | None = None, **kwargs):
        image_inputs, replacements = super()._process_images(images, **kwargs)
        replacements = [
            self.replace_image_token(image_inputs, index, num_visual_tokens=num_visual_tokens, **kwargs)
            for index in range(len(replacements))
        ]
        if self.num_visual_tokens is not None or num_visual_tokens is not None:
            image_inputs["num_visual_tokens"] = [text.count(self.image_token) for text in replacements]
        return image_inputs, replacements

    def _get_num_multimodal_tokens(self, image_sizes=None, num_visual_tokens=None, **kwargs) -> MultiModalData:
        data = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if data.num_image_tokens is not None:
            data.num_image_tokens = [self._num_kept(tokens, num_visual_tokens) for tokens in data.num_image_tokens]
        return data

    @property
    def model_input_names(self) -> list[str]:
        names = super().model_input_names
        return names if self.num_visual_tokens is None else [*names, "num_visual_tokens"]


class PruneSIDLlavaProcessor(ShortPromptProcessorMixin, LlavaProcessor):
    r"""
    [`LlavaProcessor`] that writes N placeholders for an image and returns N of each image as `num_visual_tokens`, a
    tensor of shape `(num_images,)` that the model obeys.

    Args:
        num_visual_tokens (`int` or `float`, *optional*):
            N, or its share of the image's tokens: the `budget` of the model's `prunesid_config`. None (for a dynamic
            budget, or off) writes the full prompt of the stock processor. A call may pass another value.

    Raises:
        `ValueError`: for an invalid budget.
    """

    valid_processor_kwargs = PruneSIDLlavaProcessorKwargs
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_visual_tokens: int | float | None = None,
        **kwargs,
    ):
        check_budget(num_visual_tokens, name="num_visual_tokens")
        self.num_visual_tokens = num_visual_tokens
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )


__all__ = ["BaseTokenizer", "PruneSIDLlavaProcessor"]
