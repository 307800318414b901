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
    """
    [`Ernie4_5_VLMoeModel`] with compressing `get_*_features`; see [`GridModelMixin`]. Two frames make a slice.
    """

    config_class = PruneSIDErnie4_5_VLMoeConfig
    views_apart = ()
    along_prompt = {"moe_mm_token_type_ids": 0}

    def slices(self, modality, inputs):
        merged = self.config.vision_config.temporal_merge_size if modality == "video" else 1
        return [frames // merged for frames in super().slices(modality, inputs)]

    def pool_attention(self, patches, modality, inputs, num_tokens):
        if modality == "image":
            return super().pool_attention(patches, modality, inputs, num_tokens)
        vision, pooled = self.config.vision_config, []
        grids = inputs["video_grid_thw"]
        for own, frames in zip(patches.split(grids.prod(-1).tolist()), grids[:, 0].tolist()):
            merged = own.view(frames // vision.temporal_merge_size, vision.temporal_merge_size, -1)
            pooled.append(merged.mean(1).view(-1, vision.spatial_merge_size**2).mean(1))
        return torch.cat(pooled)


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
