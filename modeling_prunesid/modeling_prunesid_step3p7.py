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

from .family import PrunedGenerationMixin, register_family
from .local_crops import LocalCropsModelMixin
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDStep3p7Config(BehindConnectorConfig, Step3p7Config):
    """[`Step3p7Config`] with a nested [`PruneSIDConfig`], whose budget is that of each crop and of the whole image."""

    model_type = "prunesid_step3p7"


class PruneSIDStep3p7Model(LocalCropsModelMixin, Step3p7Model):
    """[`Step3p7Model`] with compressing `get_*_features`; see [`LocalCropsModelMixin`]."""

    config_class = PruneSIDStep3p7Config
    views_apart = ("image",)

    def side_of(self, pixels):
        return pixels.shape[-1] // self.config.vision_config.patch_size

    def tokens_of(self, pixels):
        return math.ceil(self.side_of(pixels) / 4) ** 2

    def pool_views(self, patches):
        """As the tower's two convolutions of stride 2, whose squares overlap."""
        side = math.isqrt(patches.shape[1])
        grids = patches.view(-1, 1, side, side)
        for _ in range(2):
            grids = torch.nn.functional.avg_pool2d(grids, 3, 2, padding=1, count_include_pad=False)
        return grids.flatten(1)


class PruneSIDStep3p7ForConditionalGeneration(PrunedGenerationMixin, Step3p7ForConditionalGeneration, GenerationMixin):
    """[`Step3p7ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDStep3p7Model


class PruneSIDStep3p7Processor(PrunedProcessorMixin, Step3p7Processor):
    """[`Step3p7Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDStep3p7AutoModel = register_family(PruneSIDStep3p7ForConditionalGeneration, PruneSIDStep3p7Processor)
