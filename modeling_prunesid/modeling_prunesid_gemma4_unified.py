"""Gemma 4 Unified with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedModel,
    Gemma4UnifiedProcessor,
    GenerationMixin,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDGemma4UnifiedConfig(BehindConnectorConfig, Gemma4UnifiedConfig):
    """
    [`Gemma4UnifiedConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image and of each frame
    of a video.
    """

    model_type = "prunesid_gemma4_unified"


class PruneSIDGemma4UnifiedModel(BehindConnectorModelMixin, Gemma4UnifiedModel):
    """[`Gemma4UnifiedModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDGemma4UnifiedConfig

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        frames = inputs["num_frames_per_video"].tolist()
        return [[size // count] * count for size, count in zip(sizes, frames)]


class PruneSIDGemma4UnifiedForConditionalGeneration(
    PrunedGenerationMixin, Gemma4UnifiedForConditionalGeneration, GenerationMixin
):
    """[`Gemma4UnifiedForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGemma4UnifiedModel


class PruneSIDGemma4UnifiedProcessor(PrunedProcessorMixin, Gemma4UnifiedProcessor):
    """[`Gemma4UnifiedProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGemma4UnifiedAutoModel = register_family(
    PruneSIDGemma4UnifiedForConditionalGeneration, PruneSIDGemma4UnifiedProcessor
)
