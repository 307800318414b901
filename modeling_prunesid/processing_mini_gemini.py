"""The processor of Mini-Gemini, in the conventions of Transformers, which has no such model."""

import torch
from torch import nn
from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData

from .configuration_mini_gemini import check_views


class MiniGeminiProcessor(LlavaProcessor):
    r"""
    [`LlavaProcessor`] that returns each image in two resolutions: as `high_res_pixel_values` what its image processor
    makes of it, and as `pixel_values` the same reduced to what the low-resolution tower takes.

    Args:
        image_processor: of the high resolution; `LlavaImageProcessor` with `do_pad=True` at 768 px in the published
            models, 1536 px in Mini-Gemini-HD.
        patch_size (`int`, defaults to 14): that of the low-resolution tower, in pixels.
        low_res_size (`int`, defaults to 336): side of the images that it takes, in pixels.
        image_grid (`int`, defaults to 1), image_global (`bool`, defaults to `False`):
            Those of the model's configuration: how many tiles it sees, and whether the whole image besides.

    Raises:
        `ValueError`: for an image grid that is none.
    """

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
        **kwargs,
    ):
        check_views(image_grid, image_global)
        self.low_res_size, self.image_grid, self.image_global = low_res_size, image_grid, image_global
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            chat_template=chat_template,
            image_token=image_token,
            **kwargs,
        )

    @property
    def num_image_tokens(self) -> int:
        """T, the tokens of an image."""
        return (self.low_res_size // self.patch_size) ** 2 * (self.image_grid**2 + self.image_global)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _process_images(self, images, **kwargs):
        image_inputs, replacements = super()._process_images(images, **kwargs)
        high_res = torch.stack([torch.as_tensor(image) for image in image_inputs["pixel_values"]])
        image_inputs["pixel_values"] = low_res_views(high_res, self.low_res_size, self.image_grid, self.image_global)
        image_inputs["high_res_pixel_values"] = high_res
        return image_inputs, replacements

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        num_images = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * num_images, num_image_patches=[1] * num_images
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "high_res_pixel_values"]


def low_res_views(images: torch.Tensor, size: int, image_grid: int, image_global: bool) -> torch.Tensor:
    """
    What the low-resolution tower sees of `images` `(num_images, channels, side, side)`: each reduced to `(num_images,
    channels, size, size)`, or as `(num_images, views, channels, size, size)` in tiles of that size, row by row, and
    the whole behind them.
    """

    def reduce(images, size):
        return nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)

    images = reduce(images, image_grid * size)
    if image_grid == 1:
        return images
    tiles = images.unflatten(3, (image_grid, size)).unflatten(2, (image_grid, size))
    views = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([views, reduce(images, size)[:, None]], dim=1) if image_global else views


__all__ = ["MiniGeminiProcessor"]
