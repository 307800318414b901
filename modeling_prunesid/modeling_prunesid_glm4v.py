"""GLM-4.1V with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vModel,
    Glm4vProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin
from .shared_id import SharedIdModelMixin, SharedIdProcessorMixin


class PruneSIDGlm4vConfig(GridConfigMixin, Glm4vConfig):
    """[`Glm4vConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_glm4v"


class PruneSIDGlm4vModel(MRoPEModelMixin, SharedIdModelMixin, GridModelMixin, Glm4vModel):
    """[`Glm4vModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDGlm4vConfig


class PruneSIDGlm4vForConditionalGeneration(PrunedGenerationMixin, Glm4vForConditionalGeneration, GenerationMixin):
    """[`Glm4vForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGlm4vModel


class PruneSIDGlm4vProcessor(SharedIdProcessorMixin, GridProcessorMixin, Glm4vProcessor):
    """[`Glm4vProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGlm4vAutoModel = register_family(PruneSIDGlm4vForConditionalGeneration, PruneSIDGlm4vProcessor)
