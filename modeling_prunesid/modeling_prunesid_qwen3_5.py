"""Qwen3.5 with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Model,
    Qwen3VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen3_5Config(GridConfigMixin, Qwen3_5Config):
    """[`Qwen3_5Config`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen3_5"


class PruneSIDQwen3_5Model(MRoPEModelMixin, GridModelMixin, Qwen3_5Model):
    """[`Qwen3_5Model`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen3_5Config


class PruneSIDQwen3_5ForConditionalGeneration(PrunedGenerationMixin, Qwen3_5ForConditionalGeneration, GenerationMixin):
    """[`Qwen3_5ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen3_5Model


class PruneSIDQwen3_5Processor(GridProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen3_5AutoModel = register_family(PruneSIDQwen3_5ForConditionalGeneration, PruneSIDQwen3_5Processor)
