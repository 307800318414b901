"""Qwen2.5-VL with PruneSID: tokens are chosen behind the patch merger and keep their positions in the full prompt."""

from transformers import (
    GenerationMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen2_5_VLConfig(GridConfigMixin, Qwen2_5_VLConfig):
    """[`Qwen2_5_VLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen2_5_vl"


class PruneSIDQwen2_5_VLModel(MRoPEModelMixin, GridModelMixin, Qwen2_5_VLModel):
    """[`Qwen2_5_VLModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen2_5_VLConfig
    views_apart = ()


class PruneSIDQwen2_5_VLForConditionalGeneration(
    PrunedGenerationMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin
):
    """[`Qwen2_5_VLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen2_5_VLModel


class PruneSIDQwen2_5_VLProcessor(GridProcessorMixin, Qwen2_5_VLProcessor):
    """[`Qwen2_5_VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen2_5_VLAutoModel = register_family(PruneSIDQwen2_5_VLForConditionalGeneration, PruneSIDQwen2_5_VLProcessor)
