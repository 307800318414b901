"""GLM-4.5V with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vMoeModel,
    Glm4vProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin
from .shared_id import SharedIdModelMixin, SharedIdProcessorMixin


class PruneSIDGlm4vMoeConfig(GridConfigMixin, Glm4vMoeConfig):
    """[`Glm4vMoeConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_glm4v_moe"


class PruneSIDGlm4vMoeModel(MRoPEModelMixin, SharedIdModelMixin, GridModelMixin, Glm4vMoeModel):
    """[`Glm4vMoeModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDGlm4vMoeConfig


class PruneSIDGlm4vMoeForConditionalGeneration(
    PrunedGenerationMixin, Glm4vMoeForConditionalGeneration, GenerationMixin
):
    """[`Glm4vMoeForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGlm4vMoeModel


class PruneSIDGlm4vMoeProcessor(SharedIdProcessorMixin, GridProcessorMixin, Glm4vProcessor):
    """[`Glm4vProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGlm4vMoeAutoModel = register_family(PruneSIDGlm4vMoeForConditionalGeneration, PruneSIDGlm4vMoeProcessor)
