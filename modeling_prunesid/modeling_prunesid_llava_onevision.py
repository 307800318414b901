"""
LLaVA-OneVision with PruneSID: tokens are compared as they enter the language model.

The newline token behind a video, and those of the grid of crops, are of no view.
"""

import functools
import math
from types import SimpleNamespace

import torch
from transformers import (
    GenerationMixin,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)

from .anyres import PackedModelMixin, packed_views
from .budgets import View
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDLlavaOnevisionConfig(BehindConnectorConfig, LlavaOnevisionConfig):
    """
    [`LlavaOnevisionConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop of an image and of
    each frame of a video.
    """

    model_type = "prunesid_llava_onevision"


def are_cropped(batch_num_images):
    """Which images are cropped: those that share a row of the batch with others are not. None for all."""
    counts = [] if batch_num_images is None else torch.as_tensor(batch_num_images).tolist()
    return [count == 1 for count in counts for _ in range(count)] or None


class PruneSIDLlavaOnevisionModel(PackedModelMixin, LlavaOnevisionModel):
    """[`LlavaOnevisionModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLlavaOnevisionConfig
    pools_tensor = ("video",)

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        frames = inputs["pixel_values_videos"].shape[1]
        return [[View(rows) for rows in torch.arange(size - 1).chunk(frames)] for size in sizes]

    def layout(self, inputs):
        """How upstream lays out images: those that share a row of the batch with others are a single crop."""
        ratio = inputs.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        return {"is_cropped": are_cropped(inputs.get("batch_num_images")), "vision_aspect_ratio": ratio}

    def pool_attention(self, patches, modality, inputs, num_tokens):
        if modality == "image":
            return super().pool_attention(patches, modality, inputs, num_tokens)
        vision = self.config.vision_config
        return self.apply_pooling(patches.view(-1, (vision.image_size // vision.patch_size) ** 2, 1)).flatten()


class PruneSIDLlavaOnevisionForConditionalGeneration(
    PrunedGenerationMixin, LlavaOnevisionForConditionalGeneration, GenerationMixin
):
    """[`LlavaOnevisionForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaOnevisionModel


class PruneSIDLlavaOnevisionProcessor(PrunedProcessorMixin, LlavaOnevisionProcessor):
    """[`LlavaOnevisionProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        if modality == "video":
            frames = len(inputs["pixel_values_videos"][index])
            return [(sum(runs) - 1) // frames] * frames
        is_cropped = are_cropped(inputs["batch_num_images"])[index]
        crop = inputs["pixel_values"][0][0].shape[-1]
        vision = SimpleNamespace(image_size=crop, patch_size=crop // math.isqrt(self.num_image_tokens))
        config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=self.image_processor.image_grid_pinpoints)
        pack = functools.partial(LlavaOnevisionModel.pack_image_features, SimpleNamespace(config=config))
        size, options = inputs["image_sizes"][index], {"vision_aspect_ratio": self.vision_aspect_ratio}
        [views] = packed_views(pack, config, torch.as_tensor(size)[None], [is_cropped], **options)
        return [len(view.rows) for view in views]


PruneSIDLlavaOnevisionAutoModel = register_family(
    PruneSIDLlavaOnevisionForConditionalGeneration, PruneSIDLlavaOnevisionProcessor
)
