"""Qwen3-Omni's thinker with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerModel,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen3OmniMoeThinkerConfig(GridConfigMixin, Qwen3OmniMoeThinkerConfig):
    """[`Qwen3OmniMoeThinkerConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen3_omni_moe_thinker"


class PruneSIDQwen3OmniMoeThinkerModel(MRoPEModelMixin, GridModelMixin, Qwen3OmniMoeThinkerModel):
    """[`Qwen3OmniMoeThinkerModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen3OmniMoeThinkerConfig
    views_apart = ()


class PruneSIDQwen3OmniMoeThinkerForConditionalGeneration(
    PrunedGenerationMixin, Qwen3OmniMoeThinkerForConditionalGeneration, GenerationMixin
):
    """[`Qwen3OmniMoeThinkerForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen3OmniMoeThinkerModel


class PruneSIDQwen3OmniMoeThinkerProcessor(GridProcessorMixin, Qwen3OmniMoeProcessor):
    """[`Qwen3OmniMoeProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen3OmniMoeThinkerAutoModel = register_family(
    PruneSIDQwen3OmniMoeThinkerForConditionalGeneration, PruneSIDQwen3OmniMoeThinkerProcessor
)
