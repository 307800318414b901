"""DeepSeek-VL (1.3B) with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLModel,
    DeepseekVLProcessor,
    GenerationMixin,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDDeepseekVLConfig(BehindConnectorConfig, DeepseekVLConfig):
    """[`DeepseekVLConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_deepseek_vl"


class PruneSIDDeepseekVLModel(BehindConnectorModelMixin, DeepseekVLModel):
    """[`DeepseekVLModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDDeepseekVLConfig
    pools_tensor = ("image",)

    def patches_per_token(self):
        return 1


class PruneSIDDeepseekVLForConditionalGeneration(
    PrunedGenerationMixin, DeepseekVLForConditionalGeneration, GenerationMixin
):
    """[`DeepseekVLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDDeepseekVLModel


class PruneSIDDeepseekVLProcessor(PrunedProcessorMixin, DeepseekVLProcessor):
    """[`DeepseekVLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDDeepseekVLAutoModel = register_family(PruneSIDDeepseekVLForConditionalGeneration, PruneSIDDeepseekVLProcessor)
