"""LLaVA-NeXT-Video with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
    LlavaNextVideoProcessor,
)

from .anyres import PackedModelMixin, views_of_crops
from .attention import square_grids
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, register_family
from .processing import PrunedProcessorMixin


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


class PruneSIDLlavaNextVideoForConditionalGeneration(
    PrunedGenerationMixin, LlavaNextVideoForConditionalGeneration, GenerationMixin
):
    """[`LlavaNextVideoForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaNextVideoModel


class PruneSIDLlavaNextVideoProcessor(PrunedProcessorMixin, LlavaNextVideoProcessor):
    """[`LlavaNextVideoProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        if modality == "video":
            frames = len(inputs["pixel_values_videos"][index])
            return [sum(runs) // frames] * frames
        size, crop = inputs["image_sizes"][index], inputs["pixel_values"][0][0].shape[-1]
        grids = self.image_processor.image_grid_pinpoints
        views = views_of_crops([int(side) for side in size], grids, crop, self.patch_size)
        return [len(view.rows) for view in views]


PruneSIDLlavaNextVideoAutoModel = register_family(
    PruneSIDLlavaNextVideoForConditionalGeneration, PruneSIDLlavaNextVideoProcessor
)
