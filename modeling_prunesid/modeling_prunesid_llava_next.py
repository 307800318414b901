"""LLaVA-NeXT with PruneSID: tokens are chosen in each crop of an image, and only the kept ones are projected."""

from transformers import (
    GenerationMixin,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
)

from .configuration_prunesid import NestsPruneSIDConfig
from .family import PrunedGenerationMixin, register_family
from .tower_crops import TowerCropsModelMixin, TowerCropsProcessorMixin


class PruneSIDLlavaNextConfig(NestsPruneSIDConfig, LlavaNextConfig):
    """
    [`LlavaNextConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop, or with
    `budget_scope="image"` of the whole image.
    """

    model_type = "prunesid_llava_next"


class PruneSIDLlavaNextModel(TowerCropsModelMixin, LlavaNextModel):
    """[`LlavaNextModel`] with a compressing `get_image_features`; see [`TowerCropsModelMixin`]."""

    config_class = PruneSIDLlavaNextConfig
    towers = {"image": "vision_tower"}
    projector_name = "multi_modal_projector"


class PruneSIDLlavaNextForConditionalGeneration(
    PrunedGenerationMixin, LlavaNextForConditionalGeneration, GenerationMixin
):
    """[`LlavaNextForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaNextModel


class PruneSIDLlavaNextProcessor(TowerCropsProcessorMixin, LlavaNextProcessor):
    """[`LlavaNextProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDLlavaNextAutoModel = register_family(PruneSIDLlavaNextForConditionalGeneration, PruneSIDLlavaNextProcessor)
