"""
Mini-Gemini (arXiv 2403.18814), in the conventions of Transformers, which has no such model.

It is LLaVA with a second tower. A ConvNeXt sees the image in high resolution; its map has a window of M x M features
for each token of the low-resolution tower. By patch-info mining (section 3.2) each token attends to its own window,
and what it finds there is added to it. The language model gets no more tokens than LLaVA's.
"""

import math

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_mini_gemini import MiniGeminiConfig
from .upstream import like_upstream


class MiniGeminiPatchInfoMining(nn.Module):
    """Each low-resolution token attends to its own window of the high-resolution map (section 3.2, equation 1)."""

    def __init__(self, config: MiniGeminiConfig):
        super().__init__()
        low, high = config.vision_config.hidden_size, sum(config.high_res_vision_config.hidden_sizes)
        self.query_projector = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.key_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.value_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))

    def forward(self, tokens: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            tokens (`torch.Tensor` of shape `(views, side ** 2, low_dim)`): row by row.
            maps (`torch.Tensor` of shape `(views, high_dim, side * M, side * M)`).

        Returns:
            `torch.Tensor` of the shape of `tokens`: what each of them finds in its window.
        """
        side = math.isqrt(tokens.shape[1])
        windows = maps.permute(0, 2, 3, 1).unflatten(2, (side, -1)).unflatten(1, (side, -1))
        windows = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (views, side ** 2, M ** 2, high_dim)
        queries, keys = self.query_projector(tokens)[:, :, None], self.key_projector(windows)
        logits = queries @ (keys.transpose(-1, -2) / keys.shape[-1] ** 0.5)
        # In float16 a logit may overflow, which softmax would spread as NaN over the window.
        weights = logits.nan_to_num().softmax(-1)
        return (weights @ self.value_projector(windows))[:, :, 0]


class MiniGeminiModel(LlavaModel):
    """
    [`LlavaModel`] with a high-resolution tower. Modifications:
        - `get_image_features` and `forward` also take the images in high resolution.
    """

    config: MiniGeminiConfig
    config_class = MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.high_res_vision_tower = AutoModel.from_config(config.high_res_vision_config)
        self.high_res_vision_tower.layernorm = nn.Identity()  # of pooled features, which nothing reads
        self.patch_info_mining = MiniGeminiPatchInfoMining(config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_high_res_features(self, high_res_pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The maps of all stages of the ConvNeXt, in the resolution of the first, one behind the other: images
        `(num_images, channels, height, width)` to `(num_images, sum of hidden_sizes, height / 4, width / 4)`.
        """
        pixels = high_res_pixel_values.to(self.high_res_vision_tower.dtype)  # as CLIP casts its own
        outputs = self.high_res_vision_tower(pixels, output_hidden_states=True, return_dict=True)
        stages = outputs.hidden_states[1:]
        size = stages[0].shape[-2:]
        resized = [_resize(stage, size) for stage in stages[1:]]
        return torch.cat([stages[0], *resized], dim=1)

    def get_image_tokens(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        r"""
        The output of the low-resolution tower, and the final image tokens `(num_images, T, low_dim)` before the
        projector. T counts those of the whole image first, where the model has it besides the tiles, then those of
        tile after tile.

        Args: as for `get_image_features`.

        Raises:
            `ValueError`: for images of other shapes than the configuration describes.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        self._check_images(pixel_values, high_res_pixel_values, vision_feature_select_strategy)
        grid, num_views = self.config.image_grid, self.config.views_per_image
        views = pixel_values if num_views == 1 else pixel_values.flatten(0, 1)
        outputs = self.vision_tower(views, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        tokens = outputs.hidden_states[layer][:, 1:]

        maps = self.get_high_res_features(high_res_pixel_values).to(tokens.device, tokens.dtype)
        if num_views > 1:
            tiles = maps.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
            if self.config.image_global:
                whole = _resize(maps, tiles.shape[-2:])
                tiles = torch.cat([tiles, whole[:, None]], dim=1)
            maps = tiles.flatten(0, 1)
        tokens = (tokens + self.patch_info_mining(tokens, maps)).unflatten(0, (-1, num_views))
        if self.config.image_global:
            tokens = tokens.roll(1, dims=1)
        return outputs, tokens.flatten(1, 2)

    def _check_images(self, pixel_values, high_res_pixel_values, vision_feature_select_strategy) -> None:
        if vision_feature_select_strategy not in (None, "default"):
            raise ValueError(
                "vision_feature_select_strategy must be 'default' for Mini-Gemini, got "
                f"{vision_feature_select_strategy!r}: a CLS token has no window of the high-resolution map."
            )
        if high_res_pixel_values is None:
            raise ValueError(
                "high_res_pixel_values is missing: Mini-Gemini sees each image in two resolutions. Pass both, as the "
                "model's processor returns them."
            )
        num_views, patch_size = self.config.views_per_image, self.config.vision_config.patch_size
        leading = (len(high_res_pixel_values), *([num_views] if num_views > 1 else []))
        if pixel_values.shape[:-3] != leading:
            raise ValueError(
                f"pixel_values must have the shape {leading} + (channels, height, width) for these "
                f"{len(high_res_pixel_values)} images in high_res_pixel_values and config.image_grid="
                f"{self.config.image_grid}, config.image_global={self.config.image_global}; got "
                f"{tuple(pixel_values.shape)}. The model's processor makes both."
            )
        stride = self.high_res_vision_tower.config.patch_size
        windows = self.config.image_grid * (pixel_values.shape[-1] // patch_size)
        sides = {pixel_values.shape[-1], pixel_values.shape[-2]}, set(high_res_pixel_values.shape[-2:])
        if any(len(side) > 1 for side in sides) or high_res_pixel_values.shape[-1] % (windows * stride):
            raise ValueError(
                f"high_res_pixel_values must be squares whose side is a multiple of {windows * stride} pixels, "
                f"{stride} for each feature in a window of each of the {windows} x {windows} patches, got "
                f"{tuple(high_res_pixel_values.shape)} for pixel_values of shape {tuple(pixel_values.shape)}."
            )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes images and projects their tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
                With `config.image_grid > 1` of shape `(num_images, views, channels, height, width)`: tiles row by row,
                then the whole image where `config.image_global` is set.
            high_res_pixel_values (`torch.Tensor` of shape `(num_images, channels, high_res_height, high_res_width)`).

        Returns:
            The output of the low-resolution tower, whose `pooler_output` is a list of `(T, hidden_size)`.

        Raises:
            `ValueError`: for images of other shapes than the configuration describes.
        """
        outputs, tokens = self.get_image_tokens(
            pixel_values, high_res_pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        outputs.pooler_output = list(self.multi_modal_projector(tokens))
        return outputs

    @like_upstream(LlavaModel.forward)
    def forward(
        self,
        *,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **inputs,
    ) -> tuple | LlavaModelOutputWithPast:
        """LLaVA's `forward`, on images in two resolutions."""
        if pixel_values is not None and mm_encoder_outputs is None:
            features = self.get_image_features(
                pixel_values,
                high_res_pixel_values,
                vision_feature_layer,
                vision_feature_select_strategy,
                return_dict=True,
            )
            pixel_values, mm_encoder_outputs = None, {"image": features}
        return super().forward(pixel_values=pixel_values, mm_encoder_outputs=mm_encoder_outputs, **inputs)


class MiniGeminiForConditionalGeneration(LlavaForConditionalGeneration, GenerationMixin):
    """
    [`LlavaForConditionalGeneration`] with a high-resolution tower. Modifications:
        - `get_image_features`, `forward` and `generate` also take the images in high resolution.
    """

    config: MiniGeminiConfig
    config_class = MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`MiniGeminiModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values=pixel_values,
            high_res_pixel_values=high_res_pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )

    @like_upstream(LlavaForConditionalGeneration.forward)
    def forward(
        self, *, high_res_pixel_values: torch.Tensor | None = None, **inputs
    ) -> tuple | LlavaCausalLMOutputWithPast:
        """LLaVA's `forward`, on images in two resolutions."""
        return super().forward(high_res_pixel_values=high_res_pixel_values, **inputs)


def _resize(maps: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    resized = nn.functional.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)
    return resized.to(maps.dtype)


__all__ = ["MiniGeminiForConditionalGeneration", "MiniGeminiModel"]
