"""MiniCPM-V 4.7 with PruneSID: tokens are compared as they enter the language model, and keep their positions."""

from transformers import (
    GenerationMixin,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Model,
    MiniCPMV4_7Processor,
)

from .family import PrunedGenerationMixin, register_family
from .mrope import MRoPEModelMixin
from .no_cls import BehindConnectorConfig
from .slices import SlicedModelMixin
from .tiles import TiledProcessorMixin


class PruneSIDMiniCPMV4_7Config(BehindConnectorConfig, MiniCPMV4_7Config):
    """
    [`MiniCPMV4_7Config`] with a nested [`PruneSIDConfig`], whose budget is that of each slice of an image or of a
    frame.
    """

    model_type = "prunesid_minicpmv4_7"


class PruneSIDMiniCPMV4_7Model(MRoPEModelMixin, SlicedModelMixin, MiniCPMV4_7Model):
    """[`MiniCPMV4_7Model`] with compressing `get_*_features`; see [`SlicedModelMixin`]."""

    config_class = PruneSIDMiniCPMV4_7Config


class PruneSIDMiniCPMV4_7ForConditionalGeneration(
    PrunedGenerationMixin, MiniCPMV4_7ForConditionalGeneration, GenerationMixin
):
    """[`MiniCPMV4_7ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniCPMV4_7Model


class PruneSIDMiniCPMV4_7Processor(TiledProcessorMixin, MiniCPMV4_7Processor):
    """[`MiniCPMV4_7Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDMiniCPMV4_7AutoModel = register_family(
    PruneSIDMiniCPMV4_7ForConditionalGeneration, PruneSIDMiniCPMV4_7Processor
)
