"""Inkling 2 with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    Inkling2Config,
    Inkling2ForConditionalGeneration,
    Inkling2Model,
    Inkling2Processor,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDInkling2Config(BehindConnectorConfig, Inkling2Config):
    """[`Inkling2Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_inkling2"


class PruneSIDInkling2Model(BehindConnectorModelMixin, Inkling2Model):
    """[`Inkling2Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDInkling2Config

    def sizes_of(self, modality, inputs):
        return inputs["image_grid_thw"].prod(-1).tolist()

    def pool_attention(self, patches, modality, inputs, num_tokens):
        return patches.view(num_tokens, -1).mean(1)  # those of a token lie one behind the other


class PruneSIDInkling2ForConditionalGeneration(
    PrunedGenerationMixin, Inkling2ForConditionalGeneration, GenerationMixin
):
    """[`Inkling2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDInkling2Model


class PruneSIDInkling2Processor(PrunedProcessorMixin, Inkling2Processor):
    """[`Inkling2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDInkling2AutoModel = register_family(PruneSIDInkling2ForConditionalGeneration, PruneSIDInkling2Processor)
