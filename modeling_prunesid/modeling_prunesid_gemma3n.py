"""Gemma 3n with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nModel,
    Gemma3nProcessor,
    GenerationMixin,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDGemma3nConfig(BehindConnectorConfig, Gemma3nConfig):
    """[`Gemma3nConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_gemma3n"


class PruneSIDGemma3nModel(BehindConnectorModelMixin, Gemma3nModel):
    """[`Gemma3nModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDGemma3nConfig
    pools_tensor = ("image",)
    along_prompt = {"per_layer_inputs": 0.0}


class PruneSIDGemma3nForConditionalGeneration(PrunedGenerationMixin, Gemma3nForConditionalGeneration, GenerationMixin):
    """[`Gemma3nForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGemma3nModel


class PruneSIDGemma3nProcessor(PrunedProcessorMixin, Gemma3nProcessor):
    """[`Gemma3nProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGemma3nAutoModel = register_family(PruneSIDGemma3nForConditionalGeneration, PruneSIDGemma3nProcessor)
