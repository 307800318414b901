"""LLaVA-NeXT-Video with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
    LlavaNextVideoProcessor,
)

from .anyres import PackedModelMixin, PackedProcessorMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids


class PruneSIDLlavaNextVideoConfig(BehindConnectorConfig, LlavaNextVideoConfig):
    """
    [`LlavaNextVideoConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop of an image and of
    each frame of a video.
    """

    model_type = "prunesid_llava_next_video"


class PruneSIDLlavaNextVideoModel(PackedModelMixin, LlavaNextVideoModel):
    """[`LlavaNextVideoModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLlavaNextVideoConfig

    patch_grids = square_grids

    def tokens_of_frame(self, inputs):
        return (self.crop_side // self.config.spatial_pool_stride) ** 2


class PruneSIDLlavaNextVideoForConditionalGeneration(
    PrunedGenerationMixin, LlavaNextVideoForConditionalGeneration, GenerationMixin
):
    """[`LlavaNextVideoForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaNextVideoModel


class PruneSIDLlavaNextVideoProcessor(PackedProcessorMixin, LlavaNextVideoProcessor):
    """[`LlavaNextVideoProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDLlavaNextVideoAutoModel = register_family(
    PruneSIDLlavaNextVideoForConditionalGeneration, PruneSIDLlavaNextVideoProcessor
)
