"""MiniCPM-V 4.6 with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Model,
    MiniCPMV4_6Processor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .slices import SlicedModelMixin
from .tiles import TiledProcessorMixin


class PruneSIDMiniCPMV4_6Config(BehindConnectorConfig, MiniCPMV4_6Config):
    """
    [`MiniCPMV4_6Config`] with a nested [`PruneSIDConfig`], whose budget is that of each slice of an image or of a
    frame.
    """

    model_type = "prunesid_minicpmv4_6"


class PruneSIDMiniCPMV4_6Model(SlicedModelMixin, MiniCPMV4_6Model):
    """[`MiniCPMV4_6Model`] with compressing `get_*_features`; see [`SlicedModelMixin`]."""

    config_class = PruneSIDMiniCPMV4_6Config


class PruneSIDMiniCPMV4_6ForConditionalGeneration(
    PrunedGenerationMixin, MiniCPMV4_6ForConditionalGeneration, GenerationMixin
):
    """[`MiniCPMV4_6ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniCPMV4_6Model


class PruneSIDMiniCPMV4_6Processor(TiledProcessorMixin, MiniCPMV4_6Processor):
    """[`MiniCPMV4_6Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDMiniCPMV4_6AutoModel = register_family(
    PruneSIDMiniCPMV4_6ForConditionalGeneration, PruneSIDMiniCPMV4_6Processor
)
