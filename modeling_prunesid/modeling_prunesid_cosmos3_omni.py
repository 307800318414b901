"""Cosmos3-Omni with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Cosmos3OmniModel,
    GenerationMixin,
    Qwen3VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDCosmos3OmniConfig(GridConfigMixin, Cosmos3OmniConfig):
    """[`Cosmos3OmniConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_cosmos3_omni"


class PruneSIDCosmos3OmniModel(MRoPEModelMixin, GridModelMixin, Cosmos3OmniModel):
    """[`Cosmos3OmniModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDCosmos3OmniConfig


class PruneSIDCosmos3OmniForConditionalGeneration(
    PrunedGenerationMixin, Cosmos3OmniForConditionalGeneration, GenerationMixin
):
    """[`Cosmos3OmniForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDCosmos3OmniModel


class PruneSIDCosmos3OmniProcessor(GridProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDCosmos3OmniAutoModel = register_family(
    PruneSIDCosmos3OmniForConditionalGeneration, PruneSIDCosmos3OmniProcessor
)
