"""Cohere2 Vision (Command A Vision) with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionModel,
    Cohere2VisionProcessor,
    GenerationMixin,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDCohere2VisionConfig(BehindConnectorConfig, Cohere2VisionConfig):
    """[`Cohere2VisionConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile."""

    model_type = "prunesid_cohere2_vision"


class PruneSIDCohere2VisionModel(TiledModelMixin, Cohere2VisionModel):
    """[`Cohere2VisionModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDCohere2VisionConfig
    pools_tensor = ("image",)
    patch_grids = square_grids

    def patches_per_token(self):
        return self.config.downsample_factor**2


class PruneSIDCohere2VisionForConditionalGeneration(
    PrunedGenerationMixin, Cohere2VisionForConditionalGeneration, GenerationMixin
):
    """[`Cohere2VisionForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDCohere2VisionModel


class PruneSIDCohere2VisionProcessor(TiledProcessorMixin, Cohere2VisionProcessor):
    """[`Cohere2VisionProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDCohere2VisionAutoModel = register_family(
    PruneSIDCohere2VisionForConditionalGeneration, PruneSIDCohere2VisionProcessor
)
