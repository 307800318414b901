"""Unlimited-OCR with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrModel,
    UnlimitedOcrProcessor,
)

from .budgets import View
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, register_family
from .local_crops import LocalCropsModelMixin, LocalCropsProcessorMixin, owners_of_grid


class PruneSIDUnlimitedOcrConfig(BehindConnectorConfig, UnlimitedOcrConfig):
    """[`UnlimitedOcrConfig`] with a nested [`PruneSIDConfig`]: the budget of each crop and of the whole image."""

    model_type = "prunesid_unlimited_ocr"


class PruneSIDUnlimitedOcrModel(LocalCropsModelMixin, UnlimitedOcrModel):
    """[`UnlimitedOcrModel`] with compressing `get_*_features`; see [`LocalCropsModelMixin`]."""

    config_class = PruneSIDUnlimitedOcrConfig
    tower_name = "vision_tower.vision_encoder"

    def views(self, modality, inputs, sizes):
        """The grid of crops, row by row with a newline token behind each, then the whole image, then a separator."""
        views = []
        for index, count in enumerate(self.num_crops(inputs)):
            owners = owners_of_grid(1, 1, self.side_of(inputs["pixel_values"]), count)
            if count:
                columns, rows = (int(number) for number in inputs["patches_grid"][index])
                crops = owners_of_grid(rows, columns, self.side_of(inputs["pixel_values_local"]))
                owners = torch.cat([crops, owners])
            views.append([View((owners == crop).nonzero()[:, 0]) for crop in range(count + 1)])
        return views


class PruneSIDUnlimitedOcrForConditionalGeneration(
    PrunedGenerationMixin, UnlimitedOcrForConditionalGeneration, GenerationMixin
):
    """[`UnlimitedOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDUnlimitedOcrModel


class PruneSIDUnlimitedOcrProcessor(LocalCropsProcessorMixin, UnlimitedOcrProcessor):
    """[`UnlimitedOcrProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDUnlimitedOcrAutoModel = register_family(
    PruneSIDUnlimitedOcrForConditionalGeneration, PruneSIDUnlimitedOcrProcessor
)
