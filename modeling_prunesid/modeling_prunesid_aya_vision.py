"""Aya Vision with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionModel,
    AyaVisionProcessor,
    GenerationMixin,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDAyaVisionConfig(BehindConnectorConfig, AyaVisionConfig):
    """[`AyaVisionConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile."""

    model_type = "prunesid_aya_vision"


class PruneSIDAyaVisionModel(TiledModelMixin, AyaVisionModel):
    """[`AyaVisionModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDAyaVisionConfig
    pools_tensor = ("image",)
    patch_grids = square_grids

    def patches_per_token(self):
        return self.config.downsample_factor**2


class PruneSIDAyaVisionForConditionalGeneration(
    PrunedGenerationMixin, AyaVisionForConditionalGeneration, GenerationMixin
):
    """[`AyaVisionForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDAyaVisionModel


class PruneSIDAyaVisionProcessor(TiledProcessorMixin, AyaVisionProcessor):
    """[`AyaVisionProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDAyaVisionAutoModel = register_family(PruneSIDAyaVisionForConditionalGeneration, PruneSIDAyaVisionProcessor)
