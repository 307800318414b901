"""LightOnOCR with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrModel,
    LightOnOcrProcessor,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import grids_of_image_sizes
from .processing import PrunedProcessorMixin


class PruneSIDLightOnOcrConfig(BehindConnectorConfig, LightOnOcrConfig):
    """[`LightOnOcrConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_lighton_ocr"


class PruneSIDLightOnOcrModel(BehindConnectorModelMixin, LightOnOcrModel):
    """[`LightOnOcrModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLightOnOcrConfig
    patch_grids = grids_of_image_sizes

    def sizes_of(self, modality, inputs):
        side = self.config.vision_config.patch_size * self.config.spatial_merge_size
        return (torch.as_tensor(inputs["image_sizes"]) // side).prod(-1).tolist()


class PruneSIDLightOnOcrForConditionalGeneration(
    PrunedGenerationMixin, LightOnOcrForConditionalGeneration, GenerationMixin
):
    """[`LightOnOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLightOnOcrModel


class PruneSIDLightOnOcrProcessor(PrunedProcessorMixin, LightOnOcrProcessor):
    """[`LightOnOcrProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDLightOnOcrAutoModel = register_family(PruneSIDLightOnOcrForConditionalGeneration, PruneSIDLightOnOcrProcessor)
