"""DeepSeek-VL with two towers (7B) with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridModel,
    DeepseekVLHybridProcessor,
    GenerationMixin,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDDeepseekVLHybridConfig(BehindConnectorConfig, DeepseekVLHybridConfig):
    """[`DeepseekVLHybridConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_deepseek_vl_hybrid"


class PruneSIDDeepseekVLHybridModel(BehindConnectorModelMixin, DeepseekVLHybridModel):
    """[`DeepseekVLHybridModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDDeepseekVLHybridConfig
    pools_tensor = ("image",)

    def patches_per_token(self):
        return 1


class PruneSIDDeepseekVLHybridForConditionalGeneration(
    PrunedGenerationMixin, DeepseekVLHybridForConditionalGeneration, GenerationMixin
):
    """[`DeepseekVLHybridForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDDeepseekVLHybridModel


class PruneSIDDeepseekVLHybridProcessor(PrunedProcessorMixin, DeepseekVLHybridProcessor):
    """[`DeepseekVLHybridProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDDeepseekVLHybridAutoModel = register_family(
    PruneSIDDeepseekVLHybridForConditionalGeneration, PruneSIDDeepseekVLHybridProcessor
)
