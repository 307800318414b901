"""The processor of Mini-Gemini that writes one placeholder for each kept token."""

from .configuration_prunesid import check_budget
from .processing_mini_gemini import MiniGeminiProcessor
from .processing_prunesid import PruneSIDLlavaProcessorKwargs, ShortPromptProcessorMixin


class PruneSIDMiniGeminiProcessor(ShortPromptProcessorMixin, MiniGeminiProcessor):
    r"""
    [`MiniGeminiProcessor`] that writes N placeholders for an image and returns N of each image as `num_visual_tokens`,
    a tensor of shape `(num_images,)` that the model obeys.

    Args:
        num_visual_tokens (`int` or `float`, *optional*):
            N, or its share of the image's tokens: the `budget` of the model's `prunesid_config`. None (for a dynamic
            budget, or off) writes the full prompt of the stock processor. A call may pass another value.

    Raises:
        `ValueError`: for an invalid budget or image grid.
    """

    valid_processor_kwargs = PruneSIDLlavaProcessorKwargs
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 14,
        chat_template=None,
        image_token="<image>",
        low_res_size: int = 336,
        image_grid: int = 1,
        image_global: bool = False,
        num_visual_tokens: int | float | None = None,
        **kwargs,
    ):
        check_budget(num_visual_tokens, name="num_visual_tokens")
        self.num_visual_tokens = num_visual_tokens
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            chat_template=chat_template,
            image_token=image_token,
            low_res_size=low_res_size,
            image_grid=image_grid,
            image_global=image_global,
            **kwargs,
        )


__all__ = ["PruneSIDMiniGeminiProcessor"]
