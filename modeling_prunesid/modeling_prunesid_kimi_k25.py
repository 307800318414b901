"""Kimi K2.5 with PruneSID: tokens are compared as they enter the language model."""

import math

import torch
from transformers import (
    GenerationMixin,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25Model,
    Kimi_K25Processor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDKimi_K25Config(BehindConnectorConfig, Kimi_K25Config):
    """
    [`Kimi_K25Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image and of each chunk of
    four frames of a video.
    """

    model_type = "prunesid_kimi_k25"


class PruneSIDKimi_K25Model(TiledModelMixin, Kimi_K25Model):
    """[`Kimi_K25Model`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDKimi_K25Config
    tiled = ("video",)

    def sizes_of(self, modality, inputs):
        merged = math.prod(self.config.vision_config.merge_kernel_size)
        return (inputs[f"{modality}_grid_thw"][:, 1:].prod(-1) // merged).tolist()

    def patch_grids(self, modality, inputs, num_patches):
        return torch.nn.functional.pad(inputs[f"{modality}_grid_thw"][:, 1:], (1, 0), value=1)

    def pool_attention(self, patches, modality, inputs, num_tokens):
        grids = inputs[f"{modality}_grid_thw"]  # the frames of a chunk are merged
        own = patches.split(grids.prod(-1).tolist())
        merged = torch.cat([chunk.view(frames, -1).mean(0) for chunk, frames in zip(own, grids[:, 0].tolist())])
        return super().pool_attention(merged, modality, inputs, num_tokens)


class PruneSIDKimi_K25ForConditionalGeneration(
    PrunedGenerationMixin, Kimi_K25ForConditionalGeneration, GenerationMixin
):
    """[`Kimi_K25ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDKimi_K25Model


class PruneSIDKimi_K25Processor(TiledProcessorMixin, Kimi_K25Processor):
    """[`Kimi_K25Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDKimi_K25AutoModel = register_family(PruneSIDKimi_K25ForConditionalGeneration, PruneSIDKimi_K25Processor)
