"""Step 3.7 with PruneSID: tokens are compared as they enter the language model."""

import math

import torch
from transformers import (
    GenerationMixin,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
    Step3p7Model,
    Step3p7Processor,
)

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDStep3p7Config(BehindConnectorConfig, Step3p7Config):
    """[`Step3p7Config`] with a nested [`PruneSIDConfig`], whose budget is that of each crop and of the whole image."""

    model_type = "prunesid_step3p7"


class PruneSIDStep3p7Model(PrunedModelMixin, Step3p7Model):
    """[`Step3p7Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDStep3p7Config

    def views(self, modality, inputs, sizes):
        counts = inputs.get("num_local_patches")
        counts = [0] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
        crop = self._tokens_of(inputs["pixel_values_local"]) if sum(counts) else 0
        return [[crop] * count + [size - crop * count] for size, count in zip(sizes, counts)]

    def _tokens_of(self, pixels):
        patches = pixels.shape[-1] // self.config.vision_config.patch_size
        return math.ceil(patches / 4) ** 2

    def pool_attention(self, patches, modality, inputs, num_tokens):
        """As the tower's two convolutions of stride 2 overlap; crops come before the whole image."""
        pixels = [inputs["pixel_values"], inputs.get("pixel_values_local")]
        sides = [
            0 if images is None else images.shape[-1] // self.config.vision_config.patch_size for images in pixels
        ]
        num_whole = len(inputs["pixel_values"]) * sides[0] ** 2
        pooled = []
        for part, side in zip((patches[:num_whole], patches[num_whole:]), sides):
            grids = part.view(-1, 1, side, side)
            for _ in range(2):
                grids = torch.nn.functional.avg_pool2d(grids, 3, 2, padding=1, count_include_pad=False)
            pooled.append(iter(grids.flatten(1)))
        counts = inputs.get("num_local_patches")
        counts = [0] * len(inputs["pixel_values"]) if counts is None else torch.as_tensor(counts).tolist()
        return torch.cat([next(pooled[view]) for count in counts for view in [1] * count + [0]])


class PruneSIDStep3p7ForConditionalGeneration(PrunedGenerationMixin, Step3p7ForConditionalGeneration, GenerationMixin):
    """[`Step3p7ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDStep3p7Model


class PruneSIDStep3p7Processor(PrunedProcessorMixin, Step3p7Processor):
    """[`Step3p7Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDStep3p7AutoModel = register_family(PruneSIDStep3p7ForConditionalGeneration, PruneSIDStep3p7Processor)
