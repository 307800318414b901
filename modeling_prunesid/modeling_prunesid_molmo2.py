"""Molmo 2 with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import GenerationMixin, Molmo2Config, Molmo2ForConditionalGeneration, Molmo2Model, Molmo2Processor

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDMolmo2Config(BehindConnectorConfig, Molmo2Config):
    """[`Molmo2Config`] with a nested [`PruneSIDConfig`]: the budget of each frame, and of each grid of an image."""

    model_type = "prunesid_molmo2"
    is_mm_prefix_lm = True  # placeholders see each other, which vLLM knows by the stock model type


def views_of_grid(modality, *grid):
    """The tokens of each frame of a video, or of an image in low and in high resolution."""
    if modality == "video":
        frames, rows, columns = grid
        return [rows * columns] * frames
    low_rows, low_columns, rows, columns = grid
    return [tokens for tokens in (low_rows * low_columns, rows * columns) if tokens]


class PruneSIDMolmo2Model(PrunedModelMixin, Molmo2Model):
    """[`Molmo2Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDMolmo2Config
    views_apart = ("video",)

    def runs_of(self, modality, views, inputs):
        """Of an image, each row of a grid is a run, and a break follows it."""
        if modality == "video" or "image_grids" not in inputs:
            return super().runs_of(modality, views, inputs)
        grids = torch.as_tensor(inputs["image_grids"]).view(-1, 2, 2).tolist()
        return [[columns for rows, columns in own for _ in range(rows)] for own in grids]

    def views(self, modality, inputs, sizes):
        return [views_of_grid(modality, *grid) for grid in torch.as_tensor(inputs[f"{modality}_grids"]).tolist()]

    def sizes_of(self, modality, inputs):
        return [sum(own) for own in self.views(modality, inputs, None)]

    def pool_attention(self, patches, modality, inputs, num_tokens):
        places = inputs[f"{modality}_token_pooling"].flatten(0, -2)
        is_patch = places >= 0
        return (patches[places.clamp(min=0)] * is_patch).sum(-1) / is_patch.sum(-1).clamp(min=1)


class PruneSIDMolmo2ForConditionalGeneration(PrunedGenerationMixin, Molmo2ForConditionalGeneration, GenerationMixin):
    """[`Molmo2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMolmo2Model


class PruneSIDMolmo2Processor(PrunedProcessorMixin, Molmo2Processor):
    """[`Molmo2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        return views_of_grid(modality, *map(int, inputs[f"{modality}_grids"][index]))

    def _placeholder(self, modality):
        return "<im_patch>"


PruneSIDMolmo2AutoModel = register_family(PruneSIDMolmo2ForConditionalGeneration, PruneSIDMolmo2Processor)
