"""The processor of LLaVA-NeXT that writes one placeholder for each kept token."""

from transformers import LlavaNextProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from .anyres_prunesid import PackedImage
from .configuration_prunesid import PruneSIDConfig
from .processing_prunesid import PruneSIDImagesKwargs, ShortPromptProcessorMixin
from .sharing_prunesid import request_budgets


class PruneSIDLlavaNextProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: PruneSIDImagesKwargs
    _defaults = getattr(LlavaNextProcessor.valid_processor_kwargs, "_defaults", {})


class PruneSIDLlavaNextProcessor(ShortPromptProcessorMixin, LlavaNextProcessor):
    r"""
    [`LlavaNextProcessor`] that writes a placeholder for each kept token of an image and returns their number as
    `num_visual_tokens`, a tensor of shape `(num_images,)` that the model obeys.

    Args:
        num_visual_tokens (`int` or `float`, *optional*):
            The `budget` of the model's `prunesid_config`. None (for a dynamic budget of each crop, or off) writes the
            full prompt of the stock processor. A call may pass another value.
        budget_scope (`"view"` or `"image"`, defaults to `"view"`):
            That of the model's `prunesid_config`: N counts the tokens of each crop, or of the whole image.

    Raises:
        `ValueError`: for an invalid budget.
    """

    valid_processor_kwargs = PruneSIDLlavaNextProcessorKwargs
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
        budget_scope: str = "view",
        **kwargs,
    ):
        settings = PruneSIDConfig(budget=num_visual_tokens, budget_scope=budget_scope)
        self.num_visual_tokens, self.budget_scope = settings.budget, settings.budget_scope
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

    def _num_kept_of_image(self, image_size, crop_size: int, num_visual_tokens: int | float | None) -> int:
        image = PackedImage.from_size(
            [int(side) for side in image_size], self.image_processor.image_grid_pinpoints, crop_size, self.patch_size
        )
        settings = PruneSIDConfig(budget=self.num_visual_tokens, budget_scope=self.budget_scope)
        num_tokens = [len(crop) for crop in image.crops]
        budgets = request_budgets(settings, num_visual_tokens, [num_tokens], image.patches_of_a_crop)
        return len(image.placeholders) if budgets is None else budgets.totals[0]

    def replace_image_token(
        self, image_inputs: dict, image_idx: int, num_visual_tokens: int | float | None = None, **kwargs
    ) -> str:
        crop_size = image_inputs["pixel_values"][0][0].shape[-1]
        size = image_inputs["image_sizes"][image_idx]
        return self.image_token * self._num_kept_of_image(size, crop_size, num_visual_tokens)

    def _get_num_multimodal_tokens(self, image_sizes=None, num_visual_tokens=None, **kwargs) -> MultiModalData:
        data = LlavaNextProcessor._get_num_multimodal_tokens(self, image_sizes=image_sizes, **kwargs)
        if data.num_image_tokens is not None:
            crop_size = self.image_processor.crop_size["height"]
            data.num_image_tokens = [
                self._num_kept_of_image(size, crop_size, num_visual_tokens) for size in image_sizes
            ]
        return data


__all__ = ["PruneSIDLlavaNextProcessor"]
