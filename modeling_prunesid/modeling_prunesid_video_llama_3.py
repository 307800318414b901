"""VideoLLaMA 3 with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Model,
    VideoLlama3Processor,
)

from .family import PrunedGenerationMixin, register_family
from .masked_clips import MaskedClipsModelMixin
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDVideoLlama3Config(BehindConnectorConfig, VideoLlama3Config):
    """[`VideoLlama3Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image and of each frame."""

    model_type = "prunesid_video_llama_3"


class PruneSIDVideoLlama3Model(MaskedClipsModelMixin, VideoLlama3Model):
    """[`VideoLlama3Model`] with compressing `get_*_features`; see [`MaskedClipsModelMixin`]."""

    config_class = PruneSIDVideoLlama3Config

    def pool_attention(self, patches, modality, inputs, num_tokens):
        grids, merged = inputs[f"{modality}_grid_thw"], inputs[f"{modality}_merge_sizes"].tolist()
        own = [part.view(-1, side**2).mean(1) for part, side in zip(patches.split(grids.prod(-1).tolist()), merged)]
        return torch.cat(self.left_of(modality, inputs, own))


class PruneSIDVideoLlama3ForConditionalGeneration(
    PrunedGenerationMixin, VideoLlama3ForConditionalGeneration, GenerationMixin
):
    """[`VideoLlama3ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDVideoLlama3Model


class PruneSIDVideoLlama3Processor(PrunedProcessorMixin, VideoLlama3Processor):
    """[`VideoLlama3Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDVideoLlama3AutoModel = register_family(
    PruneSIDVideoLlama3ForConditionalGeneration, PruneSIDVideoLlama3Processor
)
