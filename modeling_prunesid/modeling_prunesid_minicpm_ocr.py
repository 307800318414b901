"""MiniCPM-OCR with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMOcrModel,
    MiniCPMOcrProcessor,
)

from .attention import grids_of_slices
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, register_family
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDMiniCPMOcrConfig(BehindConnectorConfig, MiniCPMOcrConfig):
    """
    [`MiniCPMOcrConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each slice of an image or of a
    frame.
    """

    model_type = "prunesid_minicpm_ocr"


class PruneSIDMiniCPMOcrModel(TiledModelMixin, MiniCPMOcrModel):
    """[`MiniCPMOcrModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDMiniCPMOcrConfig
    tiled = ("image", "video")
    patch_grids = grids_of_slices


class PruneSIDMiniCPMOcrForConditionalGeneration(
    PrunedGenerationMixin, MiniCPMOcrForConditionalGeneration, GenerationMixin
):
    """[`MiniCPMOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniCPMOcrModel


class PruneSIDMiniCPMOcrProcessor(TiledProcessorMixin, MiniCPMOcrProcessor):
    """[`MiniCPMOcrProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDMiniCPMOcrAutoModel = register_family(PruneSIDMiniCPMOcrForConditionalGeneration, PruneSIDMiniCPMOcrProcessor)
