"""
DeepSeek-OCR 2 with PruneSID: tokens are compared as they enter the language model.

The separator behind an image is of no view.
"""

import math

import torch
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2Model,
    DeepseekOcr2Processor,
    GenerationMixin,
)

from .budgets import View
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDDeepseekOcr2Config(BehindConnectorConfig, DeepseekOcr2Config):
    """
    [`DeepseekOcr2Config`] with a nested [`PruneSIDConfig`], whose budget is that of each crop and of the whole
    image.
    """

    model_type = "prunesid_deepseek_ocr2"


class PruneSIDDeepseekOcr2Model(PrunedModelMixin, DeepseekOcr2Model):
    """[`DeepseekOcr2Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDDeepseekOcr2Config

    def views(self, modality, inputs, sizes):
        counts = inputs.get("num_local_patches")
        counts = [0] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
        crop = self._tokens_of(inputs["pixel_values_local"]) if sum(counts) else 0
        lengths = [[crop] * count + [size - 1 - crop * count] for size, count in zip(sizes, counts)]
        return [[View(rows) for rows in torch.arange(sum(own)).split(own)] for own in lengths]

    def _tokens_of(self, pixels):
        sam = self.config.vision_config.sam_config
        return 144 if (pixels.shape[-1] // sam.patch_size // 4) ** 2 <= 144 else 256


class PruneSIDDeepseekOcr2ForConditionalGeneration(
    PrunedGenerationMixin, DeepseekOcr2ForConditionalGeneration, GenerationMixin
):
    """[`DeepseekOcr2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDDeepseekOcr2Model


class PruneSIDDeepseekOcr2Processor(PrunedProcessorMixin, DeepseekOcr2Processor):
    """[`DeepseekOcr2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        count = int(inputs["num_local_patches"][index])
        size, tile = self.image_processor.size["height"], self.image_processor.tile_size
        crop, whole = (math.ceil(side / self.patch_size / self.downsample_ratio) ** 2 for side in (tile, size))
        return [crop] * count + [whole]


PruneSIDDeepseekOcr2AutoModel = register_family(
    PruneSIDDeepseekOcr2ForConditionalGeneration, PruneSIDDeepseekOcr2Processor
)
