"""HunyuanOCR with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLModel,
    HunYuanVLProcessor,
)

from .budgets import View
from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin, rows_without_newlines
from .mrope import MRoPEModelMixin


class PruneSIDHunYuanVLConfig(GridConfigMixin, HunYuanVLConfig):
    """[`HunYuanVLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_hunyuan_vl"


class PruneSIDHunYuanVLModel(MRoPEModelMixin, GridModelMixin, HunYuanVLModel):
    """
    [`HunYuanVLModel`] with compressing `get_image_features`; see [`GridModelMixin`]. An image has a token before it,
    one behind it and one at the end of each row, which leave with the first token that is dropped.
    """

    config_class = PruneSIDHunYuanVLConfig
    views_apart = ()
    has_raster_patches = True
    has_text_axis = False

    @property
    def num_axes(self):
        return len(self.config.text_config.rope_parameters["mrope_section"])

    def _behind(self, positions, offset):
        raise ValueError(
            "One coordinate of an image is its number among the images, so that new images behind a cache are not "
            "enough. Pass pixel_values and image_grid_thw of all images of the conversation."
        )

    def sizes_of(self, modality, inputs):
        sides = inputs["image_grid_thw"][:, 1:] // self.config.vision_config.spatial_merge_size
        return [height * (width + 1) + 2 for height, width in sides.tolist()]

    def views(self, modality, inputs, sizes):
        sides = inputs["image_grid_thw"][:, 1:] // self.config.vision_config.spatial_merge_size
        return [[View(rows_without_newlines(height, width, 1))] for height, width in sides.tolist()]


class PruneSIDHunYuanVLForConditionalGeneration(
    PrunedGenerationMixin, HunYuanVLForConditionalGeneration, GenerationMixin
):
    """[`HunYuanVLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDHunYuanVLModel


class PruneSIDHunYuanVLProcessor(GridProcessorMixin, HunYuanVLProcessor):
    """[`HunYuanVLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        height, width = (int(side) // self.image_processor.merge_size for side in inputs["image_grid_thw"][index][1:])
        return [height * width]


PruneSIDHunYuanVLAutoModel = register_family(PruneSIDHunYuanVLForConditionalGeneration, PruneSIDHunYuanVLProcessor)
