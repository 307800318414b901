"""LFM2-VL with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import GenerationMixin, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Lfm2VlModel, Lfm2VlProcessor

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDLfm2VlConfig(BehindConnectorConfig, Lfm2VlConfig):
    """[`Lfm2VlConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile and of the thumbnail."""

    model_type = "prunesid_lfm2_vl"


class PruneSIDLfm2VlModel(TiledModelMixin, Lfm2VlModel):
    """[`Lfm2VlModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDLfm2VlConfig
    views_apart = ()  # tags between tiles are an option of the processor

    def sizes_of(self, modality, inputs):
        return (inputs["spatial_shapes"] // self.config.downsample_factor).prod(-1).tolist()

    def patch_grids(self, modality, inputs, num_patches):
        return torch.nn.functional.pad(inputs["spatial_shapes"], (1, 0), value=1)

    def pool_attention(self, patches, modality, inputs, num_tokens):
        sizes = inputs["spatial_shapes"].prod(-1).tolist()
        own = [tile[:size] for tile, size in zip(patches.view(len(sizes), -1), sizes)]  # the rest is padding
        return super().pool_attention(torch.cat(own), modality, inputs, num_tokens)


class PruneSIDLfm2VlForConditionalGeneration(PrunedGenerationMixin, Lfm2VlForConditionalGeneration, GenerationMixin):
    """[`Lfm2VlForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLfm2VlModel


class PruneSIDLfm2VlProcessor(TiledProcessorMixin, Lfm2VlProcessor):
    """[`Lfm2VlProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDLfm2VlAutoModel = register_family(PruneSIDLfm2VlForConditionalGeneration, PruneSIDLfm2VlProcessor)
