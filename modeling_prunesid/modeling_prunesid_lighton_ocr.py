"""LightOnOCR with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrModel,
    LightOnOcrProcessor,
)

from .attention import grids_of_image_sizes
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDLightOnOcrConfig(BehindConnectorConfig, LightOnOcrConfig):
    """[`LightOnOcrConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_lighton_ocr"


class PruneSIDLightOnOcrModel(PrunedModelMixin, LightOnOcrModel):
    """[`LightOnOcrModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLightOnOcrConfig
    patch_grids = grids_of_image_sizes


class PruneSIDLightOnOcrForConditionalGeneration(
    PrunedGenerationMixin, LightOnOcrForConditionalGeneration, GenerationMixin
):
    """[`LightOnOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLightOnOcrModel


class PruneSIDLightOnOcrProcessor(PrunedProcessorMixin, LightOnOcrProcessor):
    """[`LightOnOcrProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDLightOnOcrAutoModel = register_family(PruneSIDLightOnOcrForConditionalGeneration, PruneSIDLightOnOcrProcessor)
