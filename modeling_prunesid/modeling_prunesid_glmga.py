"""GLM-GA with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Glm46VForConditionalGeneration,
    Glm46VModel,
    Glm46VProcessor,
    GlmgaConfig,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin
from .shared_id import SharedIdModelMixin, SharedIdProcessorMixin


class PruneSIDGlmgaConfig(GridConfigMixin, GlmgaConfig):
    """[`GlmgaConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_glmga"
    _also_loads = ("glm46v",)


class PruneSIDGlmgaModel(MRoPEModelMixin, SharedIdModelMixin, GridModelMixin, Glm46VModel):
    """[`Glm46VModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDGlmgaConfig


class PruneSIDGlmgaForConditionalGeneration(PrunedGenerationMixin, Glm46VForConditionalGeneration, GenerationMixin):
    """[`Glm46VForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGlmgaModel


class PruneSIDGlmgaProcessor(SharedIdProcessorMixin, GridProcessorMixin, Glm46VProcessor):
    """[`Glm46VProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGlmgaAutoModel = register_family(PruneSIDGlmgaForConditionalGeneration, PruneSIDGlmgaProcessor)
