"""Qwen3-VL with PruneSID: tokens are chosen behind the patch merger and keep their positions in the full prompt."""

from transformers import (
    GenerationMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen3VLConfig(GridConfigMixin, Qwen3VLConfig):
    """[`Qwen3VLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen3_vl"


class PruneSIDQwen3VLModel(MRoPEModelMixin, GridModelMixin, Qwen3VLModel):
    """[`Qwen3VLModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen3VLConfig


class PruneSIDQwen3VLForConditionalGeneration(PrunedGenerationMixin, Qwen3VLForConditionalGeneration, GenerationMixin):
    """[`Qwen3VLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen3VLModel


class PruneSIDQwen3VLProcessor(GridProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen3VLAutoModel = register_family(PruneSIDQwen3VLForConditionalGeneration, PruneSIDQwen3VLProcessor)
