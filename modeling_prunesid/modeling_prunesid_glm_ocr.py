"""GLM-OCR with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Glm46VProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    GlmOcrModel,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin
from .shared_id import SharedIdModelMixin, SharedIdProcessorMixin


class PruneSIDGlmOcrConfig(GridConfigMixin, GlmOcrConfig):
    """[`GlmOcrConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_glm_ocr"


class PruneSIDGlmOcrModel(MRoPEModelMixin, SharedIdModelMixin, GridModelMixin, GlmOcrModel):
    """[`GlmOcrModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDGlmOcrConfig


class PruneSIDGlmOcrForConditionalGeneration(PrunedGenerationMixin, GlmOcrForConditionalGeneration, GenerationMixin):
    """[`GlmOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGlmOcrModel


class PruneSIDGlmOcrProcessor(SharedIdProcessorMixin, GridProcessorMixin, Glm46VProcessor):
    """[`Glm46VProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGlmOcrAutoModel = register_family(PruneSIDGlmOcrForConditionalGeneration, PruneSIDGlmOcrProcessor)
