"""Janus, for understanding images with PruneSID: tokens are compared as they enter the language model."""

from transformers import GenerationMixin, JanusConfig, JanusForConditionalGeneration, JanusModel, JanusProcessor

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDJanusConfig(BehindConnectorConfig, JanusConfig):
    """[`JanusConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_janus"


class PruneSIDJanusModel(BehindConnectorModelMixin, JanusModel):
    """[`JanusModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDJanusConfig
    pools_tensor = ("image",)

    def patches_per_token(self):
        return 1


class PruneSIDJanusForConditionalGeneration(PrunedGenerationMixin, JanusForConditionalGeneration, GenerationMixin):
    """[`JanusForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDJanusModel


class PruneSIDJanusProcessor(PrunedProcessorMixin, JanusProcessor):
    """[`JanusProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDJanusAutoModel = register_family(PruneSIDJanusForConditionalGeneration, PruneSIDJanusProcessor)
