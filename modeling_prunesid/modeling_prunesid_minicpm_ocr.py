"""MiniCPM-OCR with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMOcrModel,
    MiniCPMOcrProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .slices import SlicedModelMixin
from .tiles import TiledProcessorMixin


class PruneSIDMiniCPMOcrConfig(BehindConnectorConfig, MiniCPMOcrConfig):
    """
    [`MiniCPMOcrConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each slice of an image or of a
    frame.
    """

    model_type = "prunesid_minicpm_ocr"


class PruneSIDMiniCPMOcrModel(SlicedModelMixin, MiniCPMOcrModel):
    """[`MiniCPMOcrModel`] with compressing `get_*_features`; see [`SlicedModelMixin`]."""

    config_class = PruneSIDMiniCPMOcrConfig


class PruneSIDMiniCPMOcrForConditionalGeneration(
    PrunedGenerationMixin, MiniCPMOcrForConditionalGeneration, GenerationMixin
):
    """[`MiniCPMOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniCPMOcrModel


class PruneSIDMiniCPMOcrProcessor(TiledProcessorMixin, MiniCPMOcrProcessor):
    """[`MiniCPMOcrProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDMiniCPMOcrAutoModel = register_family(PruneSIDMiniCPMOcrForConditionalGeneration, PruneSIDMiniCPMOcrProcessor)
