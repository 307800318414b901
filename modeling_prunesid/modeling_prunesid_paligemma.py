"""PaliGemma with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
    PaliGemmaProcessor,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDPaliGemmaConfig(BehindConnectorConfig, PaliGemmaConfig):
    """[`PaliGemmaConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_paligemma"
    is_mm_prefix_lm = True  # placeholders see each other, which vLLM knows by the stock model type


class PruneSIDPaliGemmaModel(BehindConnectorModelMixin, PaliGemmaModel):
    """[`PaliGemmaModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDPaliGemmaConfig
    pools_tensor = ("image",)
    first_position = 1

    def patches_per_token(self):
        return 1


class PruneSIDPaliGemmaForConditionalGeneration(
    PrunedGenerationMixin, PaliGemmaForConditionalGeneration, GenerationMixin
):
    """[`PaliGemmaForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDPaliGemmaModel


class PruneSIDPaliGemmaProcessor(PrunedProcessorMixin, PaliGemmaProcessor):
    """[`PaliGemmaProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDPaliGemmaAutoModel = register_family(PruneSIDPaliGemmaForConditionalGeneration, PruneSIDPaliGemmaProcessor)
