"""ViP-LLaVA with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
    VipLlavaModel,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDVipLlavaConfig(BehindConnectorConfig, VipLlavaConfig):
    """[`VipLlavaConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_vipllava"


class PruneSIDVipLlavaModel(BehindConnectorModelMixin, VipLlavaModel):
    """[`VipLlavaModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDVipLlavaConfig
    pools_tensor = ("image",)

    def patches_per_token(self):
        return 1


class PruneSIDVipLlavaForConditionalGeneration(
    PrunedGenerationMixin, VipLlavaForConditionalGeneration, GenerationMixin
):
    """[`VipLlavaForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDVipLlavaModel


class PruneSIDVipLlavaProcessor(PrunedProcessorMixin, LlavaProcessor):
    """[`LlavaProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDVipLlavaAutoModel = register_family(PruneSIDVipLlavaForConditionalGeneration, PruneSIDVipLlavaProcessor)
