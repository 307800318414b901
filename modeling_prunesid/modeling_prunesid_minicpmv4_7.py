"""MiniCPM-V 4.7 with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Model,
    MiniCPMV4_7Processor,
)

from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .grids import GridConfigMixin
from .mrope import MRoPEModelMixin
from .processing import PrunedProcessorMixin


class PruneSIDMiniCPMV4_7Config(GridConfigMixin, MiniCPMV4_7Config):
    """[`MiniCPMV4_7Config`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_minicpmv4_7"


class PruneSIDMiniCPMV4_7Model(MRoPEModelMixin, PrunedModelMixin, MiniCPMV4_7Model):
    """[`MiniCPMV4_7Model`] with compressing `get_*_features`; a view is a slice of an image or frame."""

    config_class = PruneSIDMiniCPMV4_7Config

    def slices(self, modality, inputs):
        return []


class PruneSIDMiniCPMV4_7ForConditionalGeneration(
    PrunedGenerationMixin, MiniCPMV4_7ForConditionalGeneration, GenerationMixin
):
    """[`MiniCPMV4_7ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniCPMV4_7Model


class PruneSIDMiniCPMV4_7Processor(PrunedProcessorMixin, MiniCPMV4_7Processor):
    """[`MiniCPMV4_7Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDMiniCPMV4_7AutoModel = register_family(
    PruneSIDMiniCPMV4_7ForConditionalGeneration, PruneSIDMiniCPMV4_7Processor
)
