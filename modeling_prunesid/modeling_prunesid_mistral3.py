"""Mistral Small 3.1 with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PixtralProcessor,
)

from .attention import grids_of_image_sizes
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDMistral3Config(BehindConnectorConfig, Mistral3Config):
    """[`Mistral3Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_mistral3"


class PruneSIDMistral3Model(PrunedModelMixin, Mistral3Model):
    """[`Mistral3Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDMistral3Config
    patch_grids = grids_of_image_sizes

    def sizes_of(self, modality, inputs):
        return [rows * columns for rows, columns in self._grids(inputs)]

    def runs_of(self, modality, views, inputs):
        """A row of patches is a run, and a break follows it."""
        return [[columns] * rows for rows, columns in self._grids(inputs)] if "image_sizes" in inputs else None

    def _grids(self, inputs):
        side = self.config.vision_config.patch_size * self.config.spatial_merge_size
        return (torch.as_tensor(inputs["image_sizes"]) // side).tolist()


class PruneSIDMistral3ForConditionalGeneration(
    PrunedGenerationMixin, Mistral3ForConditionalGeneration, GenerationMixin
):
    """[`Mistral3ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMistral3Model


class PruneSIDMistral3Processor(PrunedProcessorMixin, PixtralProcessor):
    """[`PixtralProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        return [sum(runs)]


PruneSIDMistral3AutoModel = register_family(PruneSIDMistral3ForConditionalGeneration, PruneSIDMistral3Processor)
