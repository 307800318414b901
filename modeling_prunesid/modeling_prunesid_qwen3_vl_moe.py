"""Qwen3-VL-MoE with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
    Qwen3VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen3VLMoeConfig(GridConfigMixin, Qwen3VLMoeConfig):
    """[`Qwen3VLMoeConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen3_vl_moe"


class PruneSIDQwen3VLMoeModel(MRoPEModelMixin, GridModelMixin, Qwen3VLMoeModel):
    """[`Qwen3VLMoeModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen3VLMoeConfig


class PruneSIDQwen3VLMoeForConditionalGeneration(
    PrunedGenerationMixin, Qwen3VLMoeForConditionalGeneration, GenerationMixin
):
    """[`Qwen3VLMoeForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen3VLMoeModel


class PruneSIDQwen3VLMoeProcessor(GridProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen3VLMoeAutoModel = register_family(PruneSIDQwen3VLMoeForConditionalGeneration, PruneSIDQwen3VLMoeProcessor)
