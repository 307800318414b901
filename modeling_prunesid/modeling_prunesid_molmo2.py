"""Molmo 2 with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import GenerationMixin, Molmo2Config, Molmo2ForConditionalGeneration, Molmo2Model, Molmo2Processor

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDMolmo2Config(BehindConnectorConfig, Molmo2Config):
    """
    [`Molmo2Config`] with a nested [`PruneSIDConfig`], whose budget is that of each of the two grids of an image
    (low and high resolution) and of each frame of a video.
    """

    model_type = "prunesid_molmo2"
    is_mm_prefix_lm = True  # placeholders see each other, which vLLM knows by the stock model type


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
        if modality == "video":
            frames = inputs["video_grids"][:, 0].tolist()
            return [[size // count] * count for size, count in zip(sizes, frames)]
        grids = torch.as_tensor(inputs["image_grids"]).view(-1, 2, 2).prod(-1).tolist()
        return [[tokens for tokens in own if tokens] for own in grids]

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
        if modality == "video":
            frames, rows, columns = (int(number) for number in inputs["video_grids"][index])
            return [rows * columns] * frames
        low_rows, low_columns, rows, columns = (int(number) for number in inputs["image_grids"][index])
        return [tokens for tokens in (low_rows * low_columns, rows * columns) if tokens]

    def _placeholder(self, modality):
        return "<im_patch>"


PruneSIDMolmo2AutoModel = register_family(PruneSIDMolmo2ForConditionalGeneration, PruneSIDMolmo2Processor)
