"""
DeepSeek-OCR 2 with PruneSID: tokens are compared as they enter the language model.

The separator behind an image is of no view.
"""

from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2Model,
    DeepseekOcr2Processor,
    GenerationMixin,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .local_crops import LocalCropsModelMixin, LocalCropsProcessorMixin
from .no_cls import BehindConnectorConfig


class PruneSIDDeepseekOcr2Config(BehindConnectorConfig, DeepseekOcr2Config):
    """
    [`DeepseekOcr2Config`] with a nested [`PruneSIDConfig`], whose budget is that of each crop and of the whole
    image.
    """

    model_type = "prunesid_deepseek_ocr2"


class PruneSIDDeepseekOcr2Model(LocalCropsModelMixin, DeepseekOcr2Model):
    """[`DeepseekOcr2Model`] with compressing `get_*_features`; see [`LocalCropsModelMixin`]."""

    config_class = PruneSIDDeepseekOcr2Config
    num_separators = 1

    pool_attention = BehindConnectorModelMixin.pool_attention  # tokens are queries, not merged from patches

    def tokens_of(self, pixels):
        return 144 if super().tokens_of(pixels) <= 144 else 256


class PruneSIDDeepseekOcr2ForConditionalGeneration(
    PrunedGenerationMixin, DeepseekOcr2ForConditionalGeneration, GenerationMixin
):
    """[`DeepseekOcr2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDDeepseekOcr2Model


class PruneSIDDeepseekOcr2Processor(LocalCropsProcessorMixin, DeepseekOcr2Processor):
    """[`DeepseekOcr2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDDeepseekOcr2AutoModel = register_family(
    PruneSIDDeepseekOcr2ForConditionalGeneration, PruneSIDDeepseekOcr2Processor
)
