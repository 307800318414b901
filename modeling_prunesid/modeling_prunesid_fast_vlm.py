"""FastVLM with PruneSID: tokens are compared as they enter the language model."""

from transformers import FastVlmConfig, FastVlmForConditionalGeneration, FastVlmModel, GenerationMixin, LlavaProcessor

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDFastVlmConfig(BehindConnectorConfig, FastVlmConfig):
    """[`FastVlmConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_fast_vlm"


class PruneSIDFastVlmModel(BehindConnectorModelMixin, FastVlmModel):
    """[`FastVlmModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDFastVlmConfig
    pools_tensor = ("image",)


class PruneSIDFastVlmForConditionalGeneration(PrunedGenerationMixin, FastVlmForConditionalGeneration, GenerationMixin):
    """[`FastVlmForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDFastVlmModel


class PruneSIDFastVlmProcessor(PrunedProcessorMixin, LlavaProcessor):
    """[`LlavaProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDFastVlmAutoModel = register_family(PruneSIDFastVlmForConditionalGeneration, PruneSIDFastVlmProcessor)
