"""Step 3.7 with PruneSID: tokens are compared as they enter the language model."""

import itertools
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
    views_apart = ("image",)

    def views(self, modality, inputs, sizes):
        counts = inputs.get("num_local_patches")
        counts = [0] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
        crop = math.ceil(self._side_of(inputs["pixel_values_local"]) / 4) ** 2 if sum(counts) else 0
        return [[crop] * count + [size - crop * count] for size, count in zip(sizes, counts)]

    def pool_attention(self, patches, modality, inputs, num_tokens):
        """As the tower's two convolutions of stride 2, whose squares overlap; it encodes whole images first."""
        whole, crops = inputs["pixel_values"], inputs.get("pixel_values_local")
        num_whole = len(whole) * self._side_of(whole) ** 2
        whole = self._pool_views(patches[:num_whole], self._side_of(whole))
        counts = inputs.get("num_local_patches") if crops is not None else None
        counts = [0] * len(whole) if counts is None else torch.as_tensor(counts).tolist()
        crops = iter(self._pool_views(patches[num_whole:], self._side_of(crops)) if sum(counts) else ())
        return torch.cat(
            [view for own, count in zip(whole, counts) for view in [*itertools.islice(crops, count), own]]
        )

    def _pool_views(self, patches, side):
        grids = patches.view(-1, 1, side, side)
        for _ in range(2):
            grids = torch.nn.functional.avg_pool2d(grids, 3, 2, padding=1, count_include_pad=False)
        return grids.flatten(1)

    def _side_of(self, pixels):
        return pixels.shape[-1] // self.config.vision_config.patch_size


class PruneSIDStep3p7ForConditionalGeneration(PrunedGenerationMixin, Step3p7ForConditionalGeneration, GenerationMixin):
    """[`Step3p7ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDStep3p7Model


class PruneSIDStep3p7Processor(PrunedProcessorMixin, Step3p7Processor):
    """[`Step3p7Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDStep3p7AutoModel = register_family(PruneSIDStep3p7ForConditionalGeneration, PruneSIDStep3p7Processor)
