"""Qwen4-Exp with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Qwen3VLProcessor,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
    Qwen4ExpModel,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen4ExpConfig(GridConfigMixin, Qwen4ExpConfig):
    """[`Qwen4ExpConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen4_exp"


class PruneSIDQwen4ExpModel(MRoPEModelMixin, GridModelMixin, Qwen4ExpModel):
    """[`Qwen4ExpModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen4ExpConfig


class PruneSIDQwen4ExpForConditionalGeneration(
    PrunedGenerationMixin, Qwen4ExpForConditionalGeneration, GenerationMixin
):
    """[`Qwen4ExpForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen4ExpModel


class PruneSIDQwen4ExpProcessor(GridProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen4ExpAutoModel = register_family(PruneSIDQwen4ExpForConditionalGeneration, PruneSIDQwen4ExpProcessor)
