"""Unlimited-OCR with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrModel,
    UnlimitedOcrProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .local_crops import LocalCropsProcessorMixin, NewlineCropsModelMixin
from .no_cls import BehindConnectorConfig


class PruneSIDUnlimitedOcrConfig(BehindConnectorConfig, UnlimitedOcrConfig):
    """[`UnlimitedOcrConfig`] with a nested [`PruneSIDConfig`]: the budget of each crop and of the whole image."""

    model_type = "prunesid_unlimited_ocr"


class PruneSIDUnlimitedOcrModel(NewlineCropsModelMixin, UnlimitedOcrModel):
    """[`UnlimitedOcrModel`] with compressing `get_*_features`; see [`NewlineCropsModelMixin`]."""

    config_class = PruneSIDUnlimitedOcrConfig
    tower_name = "vision_tower.vision_encoder"


class PruneSIDUnlimitedOcrForConditionalGeneration(
    PrunedGenerationMixin, UnlimitedOcrForConditionalGeneration, GenerationMixin
):
    """[`UnlimitedOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDUnlimitedOcrModel


class PruneSIDUnlimitedOcrProcessor(LocalCropsProcessorMixin, UnlimitedOcrProcessor):
    """[`UnlimitedOcrProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDUnlimitedOcrAutoModel = register_family(
    PruneSIDUnlimitedOcrForConditionalGeneration, PruneSIDUnlimitedOcrProcessor
)
