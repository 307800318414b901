"""Inkling 2 with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    Inkling2Config,
    Inkling2ForConditionalGeneration,
    Inkling2Model,
    Inkling2Processor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDInkling2Config(GridConfigMixin, Inkling2Config):
    """[`Inkling2Config`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_inkling2"


class PruneSIDInkling2Model(GridModelMixin, Inkling2Model):
    """[`Inkling2Model`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDInkling2Config


class PruneSIDInkling2ForConditionalGeneration(
    PrunedGenerationMixin, Inkling2ForConditionalGeneration, GenerationMixin
):
    """[`Inkling2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDInkling2Model


class PruneSIDInkling2Processor(GridProcessorMixin, Inkling2Processor):
    """[`Inkling2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDInkling2AutoModel = register_family(PruneSIDInkling2ForConditionalGeneration, PruneSIDInkling2Processor)
