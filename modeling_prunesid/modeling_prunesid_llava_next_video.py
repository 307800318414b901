"""LLaVA-NeXT-Video with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
    LlavaNextVideoProcessor,
)

from .anyres import packed_views
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDLlavaNextVideoConfig(BehindConnectorConfig, LlavaNextVideoConfig):
    """
    [`LlavaNextVideoConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop of an image and of
    each frame of a video.
    """

    model_type = "prunesid_llava_next_video"


class PruneSIDLlavaNextVideoModel(PrunedModelMixin, LlavaNextVideoModel):
    """[`LlavaNextVideoModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLlavaNextVideoConfig

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return packed_views(self, inputs["image_sizes"], vision_feature_select_strategy="full")
        frames = inputs["pixel_values_videos"].shape[1]
        return [[size // frames] * frames for size in sizes]


class PruneSIDLlavaNextVideoForConditionalGeneration(
    PrunedGenerationMixin, LlavaNextVideoForConditionalGeneration, GenerationMixin
):
    """[`LlavaNextVideoForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaNextVideoModel


class PruneSIDLlavaNextVideoProcessor(PrunedProcessorMixin, LlavaNextVideoProcessor):
    """[`LlavaNextVideoProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDLlavaNextVideoAutoModel = register_family(
    PruneSIDLlavaNextVideoForConditionalGeneration, PruneSIDLlavaNextVideoProcessor
)
