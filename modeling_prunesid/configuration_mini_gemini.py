"""Configuration of Mini-Gemini, in the conventions of Transformers, which has no such model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig, PretrainedConfig


# OpenCLIP's ConvNeXt-L (convnext_large_d_320) at the resolution of the published models.
_CONVNEXT_LARGE = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "image_size": 768}


@strict
class MiniGeminiConfig(LlavaConfig):
    r"""
    [`LlavaConfig`] with a second tower for the image in high resolution (Mini-Gemini, arXiv 2403.18814).

    Args:
        high_res_vision_config (`dict` or `PretrainedConfig`, *optional*):
            A ConvNeXt, by default OpenCLIP's ConvNeXt-L at 768 px.
        image_grid (`int`, defaults to 1):
            The low-resolution tower sees the image in `image_grid ** 2` tiles of its own size; 2 in Mini-Gemini-HD.
        image_global (`bool`, defaults to `False`):
            It sees the whole image besides the tiles, as in Mini-Gemini-HD.

    Raises:
        `ValueError`: for settings that leave no low-resolution token for each window of the high-resolution map.
    """

    model_type = "mini_gemini"
    sub_configs = {**LlavaConfig.sub_configs, "high_res_vision_config": AutoConfig}

    high_res_vision_config: dict | PretrainedConfig | None = None
    image_grid: int = 1
    image_global: bool = False

    def __post_init__(self, **kwargs: Any):
        if self.high_res_vision_config is None:
            self.high_res_vision_config = _CONVNEXT_LARGE
        if isinstance(self.high_res_vision_config, dict):
            self.high_res_vision_config = AutoConfig.for_model(
                **{"model_type": "convnext", **self.high_res_vision_config}
            )
        super().__post_init__(**kwargs)
        check_views(self.image_grid, self.image_global)
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                "vision_feature_select_strategy must be 'default' for Mini-Gemini, where each patch has its window of "
                f"the high-resolution map and a CLS token has none, got {self.vision_feature_select_strategy!r}."
            )
        if not isinstance(self.vision_feature_layer, int):
            raise ValueError(
                f"vision_feature_layer must be a single layer for Mini-Gemini, got {self.vision_feature_layer!r}. The "
                "published models use -2."
            )

    @property
    def views_per_image(self) -> int:
        """How many crops of an image the low-resolution tower sees."""
        return self.image_grid**2 + self.image_global

    @property
    def num_image_tokens(self) -> int:
        """T, the tokens of an image."""
        vision = self.vision_config
        return (vision.image_size // vision.patch_size) ** 2 * self.views_per_image


def check_views(image_grid: int, image_global: bool) -> None:
    """Raise a `ValueError` unless the two describe the views of an image."""
    if image_grid < 1:
        raise ValueError(f"image_grid must be a positive integer, got {image_grid!r}. The published HD models use 2.")
    if image_global and image_grid == 1:
        raise ValueError(
            "image_global=True adds the whole image to its tiles, but image_grid=1 has a single tile, which is the "
            "whole image. Set image_global=False, or image_grid=2 as Mini-Gemini-HD."
        )


__all__ = ["MiniGeminiConfig"]
