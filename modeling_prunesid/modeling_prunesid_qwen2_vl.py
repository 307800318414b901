"""Qwen2-VL with PruneSID: tokens are chosen behind the patch merger and keep their positions in the full prompt."""

from transformers import (
    GenerationMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen2VLConfig(GridConfigMixin, Qwen2VLConfig):
    """[`Qwen2VLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen2_vl"


class PruneSIDQwen2VLModel(MRoPEModelMixin, GridModelMixin, Qwen2VLModel):
    """[`Qwen2VLModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen2VLConfig
    views_apart = ()


class PruneSIDQwen2VLForConditionalGeneration(PrunedGenerationMixin, Qwen2VLForConditionalGeneration, GenerationMixin):
    """[`Qwen2VLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen2VLModel


class PruneSIDQwen2VLProcessor(GridProcessorMixin, Qwen2VLProcessor):
    """[`Qwen2VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen2VLAutoModel = register_family(PruneSIDQwen2VLForConditionalGeneration, PruneSIDQwen2VLProcessor)
