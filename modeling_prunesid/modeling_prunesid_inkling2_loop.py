"""Inkling 2 Loop with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    Inkling2LoopConfig,
    Inkling2LoopForConditionalGeneration,
    Inkling2LoopModel,
    Inkling2Processor,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDInkling2LoopConfig(BehindConnectorConfig, Inkling2LoopConfig):
    """[`Inkling2LoopConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_inkling2_loop"


class PruneSIDInkling2LoopModel(BehindConnectorModelMixin, Inkling2LoopModel):
    """[`Inkling2LoopModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDInkling2LoopConfig

    def sizes_of(self, modality, inputs):
        return inputs["image_grid_thw"].prod(-1).tolist()

    def pool_attention(self, patches, modality, inputs, num_tokens):
        return patches.view(num_tokens, -1).mean(1)  # those of a token lie one behind the other


class PruneSIDInkling2LoopForConditionalGeneration(
    PrunedGenerationMixin, Inkling2LoopForConditionalGeneration, GenerationMixin
):
    """[`Inkling2LoopForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDInkling2LoopModel


class PruneSIDInkling2LoopProcessor(PrunedProcessorMixin, Inkling2Processor):
    """[`Inkling2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDInkling2LoopAutoModel = register_family(
    PruneSIDInkling2LoopForConditionalGeneration, PruneSIDInkling2LoopProcessor
)
