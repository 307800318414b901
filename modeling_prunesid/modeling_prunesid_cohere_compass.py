"""Cohere Compass with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    CohereCompassModel,
    CohereCompassProcessor,
    GenerationMixin,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDCohereCompassConfig(GridConfigMixin, CohereCompassConfig):
    """[`CohereCompassConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_cohere_compass"


class PruneSIDCohereCompassModel(MRoPEModelMixin, GridModelMixin, CohereCompassModel):
    """[`CohereCompassModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDCohereCompassConfig


class PruneSIDCohereCompassForConditionalGeneration(
    PrunedGenerationMixin, CohereCompassForConditionalGeneration, GenerationMixin
):
    """[`CohereCompassForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDCohereCompassModel


class PruneSIDCohereCompassProcessor(GridProcessorMixin, CohereCompassProcessor):
    """[`CohereCompassProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDCohereCompassAutoModel = register_family(
    PruneSIDCohereCompassForConditionalGeneration, PruneSIDCohereCompassProcessor
)
