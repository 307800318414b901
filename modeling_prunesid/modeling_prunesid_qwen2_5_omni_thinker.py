"""Qwen2.5-Omni's thinker with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerModel,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDQwen2_5OmniThinkerConfig(GridConfigMixin, Qwen2_5OmniThinkerConfig):
    """[`Qwen2_5OmniThinkerConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_qwen2_5_omni_thinker"


class PruneSIDQwen2_5OmniThinkerModel(MRoPEModelMixin, GridModelMixin, Qwen2_5OmniThinkerModel):
    """[`Qwen2_5OmniThinkerModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDQwen2_5OmniThinkerConfig
    views_apart = ()


class PruneSIDQwen2_5OmniThinkerForConditionalGeneration(
    PrunedGenerationMixin, Qwen2_5OmniThinkerForConditionalGeneration, GenerationMixin
):
    """[`Qwen2_5OmniThinkerForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQwen2_5OmniThinkerModel


class PruneSIDQwen2_5OmniThinkerProcessor(GridProcessorMixin, Qwen2_5OmniProcessor):
    """[`Qwen2_5OmniProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDQwen2_5OmniThinkerAutoModel = register_family(
    PruneSIDQwen2_5OmniThinkerForConditionalGeneration, PruneSIDQwen2_5OmniThinkerProcessor
)
