"""
Video-LLaVA with PruneSID: tokens are chosen in each frame of a clip and in each image, and only these are projected.

Upstream feeds the CLS token of each frame to the language model, but not that of an image. What it feeds is kept,
within the budget: 17 tokens of a frame are its CLS token and 16 patches.
"""

from transformers import (
    GenerationMixin,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaModel,
    VideoLlavaProcessor,
)

from .configuration_prunesid import NestsPruneSIDConfig
from .encoding import TowerModelMixin
from .family import PrunedGenerationMixin, register_family
from .frame_information import frame_information
from .processing import PrunedProcessorMixin


class PruneSIDVideoLlavaConfig(NestsPruneSIDConfig, VideoLlavaConfig):
    """
    [`VideoLlavaConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image and frame, or with
    `budget_scope="image"` of each image and clip.
    """

    model_type = "prunesid_video_llava"


class PruneSIDVideoLlavaModel(TowerModelMixin, VideoLlavaModel):
    """[`VideoLlavaModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDVideoLlavaConfig
    towers = {"image": "image_tower", "video": "video_tower"}
    projector_name, pools_tensor = "multi_modal_projector", ("image", "video")
    video_information = staticmethod(frame_information)

    def tokens_of_an_image(self) -> int:
        return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2


class PruneSIDVideoLlavaForConditionalGeneration(
    PrunedGenerationMixin, VideoLlavaForConditionalGeneration, GenerationMixin
):
    """[`VideoLlavaForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDVideoLlavaModel


class PruneSIDVideoLlavaProcessor(PrunedProcessorMixin, VideoLlavaProcessor):
    """[`VideoLlavaProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        num_views = len(inputs["pixel_values_videos"][index]) if modality == "video" else 1
        return [sum(runs) // num_views] * num_views


PruneSIDVideoLlavaAutoModel = register_family(PruneSIDVideoLlavaForConditionalGeneration, PruneSIDVideoLlavaProcessor)
