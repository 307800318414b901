"""Qwen2-VL with PruneSID: tokens are chosen behind the patch merger and keep their positions in the full prompt."""

import torch
from torch import nn
from transformers import GenerationMixin, Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLPreTrainedModel,
    Qwen2VLTextModel,
)
from transformers.utils.generic import can_return_tuple

from .configuration_prunesid import PruneSIDQwen2VLConfig
from .generation_prunesid import CompressedGenerationMixin
from .hub_prunesid import AutoModelMixin, HubModelMixin, register_class_names
from .merged_prunesid import keep_merged_tokens
from .mrope_prunesid import MRoPEModelMixin
from .processing_prunesid_qwen_vl import PruneSIDQwen2VLProcessor
from .upstream_prunesid import like_upstream


class PruneSIDQwen2VLModel(MRoPEModelMixin, HubModelMixin, Qwen2VLModel):
    """
    Modifications:
        - `get_image_features` and `get_video_features` return the kept tokens alone, with their indices.
        - `forward` drops the placeholders of the other tokens; positions stay those of the full prompt.
    """

    config: PruneSIDQwen2VLConfig
    config_class = PruneSIDQwen2VLConfig
    _auto_class = "AutoModel"
    _auto_map = {"AutoModel": "PruneSIDQwen2VLModel"}

    def __init__(self, config: PruneSIDQwen2VLConfig):
        Qwen2VLPreTrainedModel.__init__(self, config)
        self.visual = Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = Qwen2VLTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes images and keeps N tokens of each.

        Args:
            pixel_values (`torch.Tensor` of shape `(patches, channels * temporal_patch_size * patch_size ** 2)`).
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`): patches in time, down and across.
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.

        Returns:
            Upstream's output, whose `pooler_output` is a list of `(N, hidden_size)` for each image. Where tokens were
            dropped it also has `keep_indices`, a list of `(N,)` ascending indices into upstream's T tokens, and
            `num_placeholders`, T of each image.

        Raises:
            `ValueError`: for an invalid budget, or settings that need a CLS token.
        """
        output = super().get_image_features(
            pixel_values=pixel_values, image_grid_thw=image_grid_thw, return_dict=True, **kwargs
        )
        return self._keep_tokens(output, image_grid_thw, num_visual_tokens)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.LongTensor | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes videos and keeps N tokens of each temporal slice; as `get_image_features`, where a list in
        `num_visual_tokens` holds the total of each video.
        """
        output = super().get_video_features(
            pixel_values_videos=pixel_values_videos, video_grid_thw=video_grid_thw, return_dict=True, **kwargs
        )
        return self._keep_tokens(output, video_grid_thw, num_visual_tokens)

    def _keep_tokens(self, output, grid_thw, num_visual_tokens):
        merge_size = self.config.vision_config.spatial_merge_size
        return keep_merged_tokens(self.config.prunesid_config, output, grid_thw, merge_size, num_visual_tokens)

    @like_upstream(Qwen2VLModel.forward)
    def forward(self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs):
        r"""
        Upstream's `forward` on the shortened prompt.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_views,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`. A list has a count for each image, or a
                total for each video; a call with both takes a single value.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image and video.
        """
        return self.forward_compressed(super().forward, num_visual_tokens=num_visual_tokens, **inputs)


class PruneSIDQwen2VLForConditionalGeneration(
    CompressedGenerationMixin, HubModelMixin, Qwen2VLForConditionalGeneration, GenerationMixin
):
    """
    Modifications:
        - `forward` and `generate` shorten the prompt at their entrance, labels included.
        - the output of `forward` has the caller's columns, and `keep_mask`, which tells those that remain.
    """

    config: PruneSIDQwen2VLConfig
    config_class = PruneSIDQwen2VLConfig
    _auto_class = "AutoModelForImageTextToText"
    _auto_map = {
        "AutoModel": "PruneSIDQwen2VLAutoModel",
        "AutoModelForImageTextToText": "PruneSIDQwen2VLForConditionalGeneration",
        "AutoModelForMultimodalLM": "PruneSIDQwen2VLForConditionalGeneration",
    }
    _processor_class = PruneSIDQwen2VLProcessor

    def __init__(self, config: PruneSIDQwen2VLConfig):
        Qwen2VLPreTrainedModel.__init__(self, config)
        self.model = PruneSIDQwen2VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @like_upstream(Qwen2VLForConditionalGeneration.get_image_features)
    def get_image_features(
        self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs
    ):
        """See [`PruneSIDQwen2VLModel.get_image_features`]."""
        return self.model.get_image_features(num_visual_tokens=num_visual_tokens, **inputs)

    @like_upstream(Qwen2VLForConditionalGeneration.get_video_features)
    def get_video_features(
        self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs
    ):
        """See [`PruneSIDQwen2VLModel.get_video_features`]."""
        return self.model.get_video_features(num_visual_tokens=num_visual_tokens, **inputs)

    @like_upstream(Qwen2VLForConditionalGeneration.forward)
    def forward(self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs):
        r"""
        Upstream's `forward` on the shortened prompt; logits and hidden states have the caller's columns.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_views,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`. A list has a count for each image, or a
                total for each video; a call with both takes a single value.

        Returns:
            Upstream's output. Where the prompt was shortened it also has `keep_mask`, of shape `(batch, full_length)`:
            the columns of the caller's prompt that remain. A dropped column has the logits and hidden states of
            the last one before it that remains. Attentions and caches have the short length.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image and video.
        """
        return self.forward_compressed(super().forward, num_visual_tokens=num_visual_tokens, **inputs)


class PruneSIDQwen2VLAutoModel(AutoModelMixin, PruneSIDQwen2VLModel):
    """See [`AutoModelMixin`]."""

    _base_class = PruneSIDQwen2VLModel
    _generating_class = PruneSIDQwen2VLForConditionalGeneration


# Stock checkpoints load by the stock conversions, which Transformers looks up by the name of the class.
for _part in ("ForConditionalGeneration", "Model"):
    register_checkpoint_conversion_mapping(
        "PruneSIDQwen2VL" + _part, get_checkpoint_conversion_mapping("Qwen2VL" + _part), overwrite=True
    )
register_class_names(
    PruneSIDQwen2VLConfig.model_type, "PruneSIDQwen2VLForConditionalGeneration", "PruneSIDQwen2VLModel"
)

__all__ = ["PruneSIDQwen2VLAutoModel", "PruneSIDQwen2VLForConditionalGeneration", "PruneSIDQwen2VLModel"]
