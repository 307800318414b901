"""Gemma 4 with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Model, Gemma4Processor, GenerationMixin

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDGemma4Config(BehindConnectorConfig, Gemma4Config):
    """
    [`Gemma4Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image and of each frame of a
    video.
    """

    model_type = "prunesid_gemma4"


class PruneSIDGemma4Model(BehindConnectorModelMixin, Gemma4Model):
    """[`Gemma4Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDGemma4Config
    views_apart = ("video",)
    along_prompt = {"per_layer_inputs": 0.0}

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        frames = inputs["num_frames_per_video"].tolist()
        return [[size // count] * count for size, count in zip(sizes, frames)]

    def pool_attention(self, patches, modality, inputs, num_tokens):
        """Tokens are squares of patches that are named by their places `(x, y)` in the picture; -1 is padding."""
        places = inputs[f"{modality}_position_ids"].flatten(0, -3)
        side, pooled = self.config.vision_config.pooling_kernel_size, []
        for own, place in zip(patches.view(len(places), -1), places):
            own, (columns, rows) = own[place[:, 0] >= 0], place[place[:, 0] >= 0].T
            squares = columns // side + (columns.max() + 1) // side * (rows // side)
            pooled.append(own.new_zeros(int(squares.max()) + 1).index_add(0, squares, own) / side**2)
        return torch.cat(pooled)


class PruneSIDGemma4ForConditionalGeneration(PrunedGenerationMixin, Gemma4ForConditionalGeneration, GenerationMixin):
    """[`Gemma4ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGemma4Model


class PruneSIDGemma4Processor(PrunedProcessorMixin, Gemma4Processor):
    """[`Gemma4Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGemma4AutoModel = register_family(PruneSIDGemma4ForConditionalGeneration, PruneSIDGemma4Processor)
