"""Qwen3.5-MoE with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeModel,
    Qwen3VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen3_5MoeConfig(GridConfigMixin, Qwen3_5MoeConfig):
    """[`Qwen3_5MoeConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen3_5_moe"


class PruneSIDQwen3_5MoeModel(MRoPEModelMixin, GridModelMixin, Qwen3_5MoeModel):
    """[`Qwen3_5MoeModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen3_5MoeConfig


class PruneSIDQwen3_5MoeForConditionalGeneration(
    PrunedGenerationMixin, Qwen3_5MoeForConditionalGeneration, GenerationMixin
):
    """[`Qwen3_5MoeForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen3_5MoeModel


class PruneSIDQwen3_5MoeProcessor(GridProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen3_5MoeAutoModel = register_family(PruneSIDQwen3_5MoeForConditionalGeneration, PruneSIDQwen3_5MoeProcessor)
