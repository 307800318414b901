"""Molmo 2 with PruneSID: tokens are compared as they enter the language model."""

import math

import torch
from transformers import GenerationMixin, Molmo2Config, Molmo2ForConditionalGeneration, Molmo2Model, Molmo2Processor

from .broken_rows import BrokenRowsModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDMolmo2Config(BehindConnectorConfig, Molmo2Config):
    """[`Molmo2Config`] with a nested [`PruneSIDConfig`]: the budget of each frame, and of each grid of an image."""

    model_type = "prunesid_molmo2"
    is_mm_prefix_lm = True  # placeholders see each other, which vLLM knows by the stock model type


def sides_of(modality, grid):
    """Rows and columns of each frame of a video, or of an image in low and in high resolution."""
    frames, sides = (grid[0], [grid[1:]]) if modality == "video" else (1, [grid[:2], grid[2:]])
    return [own for own in sides if math.prod(own)] * frames


class PruneSIDMolmo2Model(BrokenRowsModelMixin, Molmo2Model):
    """[`Molmo2Model`] with compressing `get_*_features`; see [`BrokenRowsModelMixin`]."""

    config_class = PruneSIDMolmo2Config
    views_apart = ("video",)

    def grids(self, modality, inputs):
        grids = inputs.get(f"{modality}_grids")
        return None if grids is None else [sides_of(modality, own) for own in torch.as_tensor(grids).tolist()]

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
        return list(map(math.prod, sides_of(modality, [int(side) for side in inputs[f"{modality}_grids"][index]])))

    def _placeholder(self, modality):
        return "<im_patch>"


PruneSIDMolmo2AutoModel = register_family(PruneSIDMolmo2ForConditionalGeneration, PruneSIDMolmo2Processor)
