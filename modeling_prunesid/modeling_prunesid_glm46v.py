"""GLM-4.6V with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VModel,
    Glm46VProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin
from .shared_id import SharedIdModelMixin, SharedIdProcessorMixin


class PruneSIDGlm46VConfig(GridConfigMixin, Glm46VConfig):
    """[`Glm46VConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_glm46v"


class PruneSIDGlm46VModel(MRoPEModelMixin, SharedIdModelMixin, GridModelMixin, Glm46VModel):
    """[`Glm46VModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDGlm46VConfig


class PruneSIDGlm46VForConditionalGeneration(PrunedGenerationMixin, Glm46VForConditionalGeneration, GenerationMixin):
    """[`Glm46VForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGlm46VModel


class PruneSIDGlm46VProcessor(SharedIdProcessorMixin, GridProcessorMixin, Glm46VProcessor):
    """[`Glm46VProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGlm46VAutoModel = register_family(PruneSIDGlm46VForConditionalGeneration, PruneSIDGlm46VProcessor)
