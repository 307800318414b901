"""ERNIE 4.5 VL with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

import torch
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeModel,
    Ernie4_5_VLMoeProcessor,
    GenerationMixin,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDErnie4_5_VLMoeConfig(GridConfigMixin, Ernie4_5_VLMoeConfig):
    """[`Ernie4_5_VLMoeConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_ernie4_5_vl_moe"


class PruneSIDErnie4_5_VLMoeModel(MRoPEModelMixin, GridModelMixin, Ernie4_5_VLMoeModel):
    """[`Ernie4_5_VLMoeModel`] with compressing `get_*_features`; see [`GridModelMixin`]. Two frames make a slice."""

    config_class = PruneSIDErnie4_5_VLMoeConfig
    views_apart, along_prompt = (), {"moe_mm_token_type_ids": 0}

    def merged_frames(self, modality):
        return self.config.vision_config.temporal_merge_size if modality == "video" else 1

    def slices(self, modality, inputs):
        return [frames // self.merged_frames(modality) for frames in super().slices(modality, inputs)]

    def pool_attention(self, patches, modality, inputs, num_tokens):
        grids, merged = inputs[f"{modality}_grid_thw"], self.merged_frames(modality)
        own = zip(patches.split(grids.prod(-1).tolist()), grids[:, 1:].prod(-1).tolist())
        pooled = torch.cat([part.view(-1, merged, frame).mean(1).flatten() for part, frame in own])
        return super().pool_attention(pooled, modality, inputs, num_tokens)


class PruneSIDErnie4_5_VLMoeForConditionalGeneration(
    PrunedGenerationMixin, Ernie4_5_VLMoeForConditionalGeneration, GenerationMixin
):
    """[`Ernie4_5_VLMoeForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDErnie4_5_VLMoeModel


class PruneSIDErnie4_5_VLMoeProcessor(GridProcessorMixin, Ernie4_5_VLMoeProcessor):
    """[`Ernie4_5_VLMoeProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def num_slices(self, modality, inputs, index):
        merged = self.video_processor.temporal_patch_size if modality == "video" else 1
        return super().num_slices(modality, inputs, index) // merged


PruneSIDErnie4_5_VLMoeAutoModel = register_family(
    PruneSIDErnie4_5_VLMoeForConditionalGeneration, PruneSIDErnie4_5_VLMoeProcessor
)
