"""HunyuanOCR with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLModel,
    HunYuanVLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin
from .mrope import MRoPEModelMixin
from .newlines import NewlineGridModelMixin, NewlineGridProcessorMixin


class PruneSIDHunYuanVLConfig(GridConfigMixin, HunYuanVLConfig):
    """[`HunYuanVLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_hunyuan_vl"


class PruneSIDHunYuanVLModel(MRoPEModelMixin, NewlineGridModelMixin, HunYuanVLModel):
    """
    [`HunYuanVLModel`] with compressing `get_image_features`; see [`NewlineGridModelMixin`]. An image also has a token
    before it and one behind it, which leave as newlines do.
    """

    config_class = PruneSIDHunYuanVLConfig
    num_around = 1
    has_text_axis = False

    @property
    def num_axes(self):
        return len(self.config.text_config.rope_parameters["mrope_section"])

    def _behind(self, positions, offset):
        raise ValueError(
            "One coordinate of an image is its number among the images, so that new images behind a cache are not "
            "enough. Pass pixel_values and image_grid_thw of all images of the conversation."
        )


class PruneSIDHunYuanVLForConditionalGeneration(
    PrunedGenerationMixin, HunYuanVLForConditionalGeneration, GenerationMixin
):
    """[`HunYuanVLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDHunYuanVLModel


class PruneSIDHunYuanVLProcessor(NewlineGridProcessorMixin, HunYuanVLProcessor):
    """[`HunYuanVLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDHunYuanVLAutoModel = register_family(PruneSIDHunYuanVLForConditionalGeneration, PruneSIDHunYuanVLProcessor)
