"""PerceptionLM with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMModel,
    PerceptionLMProcessor,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .frames import FramesProcessorMixin
from .no_cls import BehindConnectorConfig


class PruneSIDPerceptionLMConfig(BehindConnectorConfig, PerceptionLMConfig):
    """
    [`PerceptionLMConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile of an image and of
    each frame of a video.
    """

    model_type = "prunesid_perception_lm"


class PruneSIDPerceptionLMModel(BehindConnectorModelMixin, PerceptionLMModel):
    """[`PerceptionLMModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDPerceptionLMConfig
    pools_tensor = ("image", "video")

    def views(self, modality, inputs, sizes):
        pixels = self._pixels(modality, inputs)
        return [[sizes[0]] * pixels.shape[1]] * len(pixels)

    def get_video_features(self, *, num_visual_tokens=None, pixel_values_videos, **inputs):
        """The features of a video's kept tokens; upstream calls its `get_image_features` for videos as well."""

        def encode(pixel_values_videos, **options):
            return PerceptionLMModel.get_image_features(self, pixel_values=pixel_values_videos, **options)

        inputs["pixel_values_videos"] = pixel_values_videos
        return self._encode("video", encode, num_visual_tokens, inputs)


class PruneSIDPerceptionLMForConditionalGeneration(
    PrunedGenerationMixin, PerceptionLMForConditionalGeneration, GenerationMixin
):
    """[`PerceptionLMForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDPerceptionLMModel


class PruneSIDPerceptionLMProcessor(FramesProcessorMixin, PerceptionLMProcessor):
    """[`PerceptionLMProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDPerceptionLMAutoModel = register_family(
    PruneSIDPerceptionLMForConditionalGeneration, PruneSIDPerceptionLMProcessor
)
