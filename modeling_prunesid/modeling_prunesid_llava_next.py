"""
LLaVA-NeXT with PruneSID: tokens are chosen in each crop of an image, and only the kept ones are projected.

Kept tokens stay in upstream's order: those of the crop that shows the whole image, then those of the other crops in
the raster order of the whole image. Patches of padding, which upstream removes, take no part. An image keeps all
patches and newline tokens, or exactly its budget and no newline token.
"""

import torch
from transformers import (
    GenerationMixin,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
)

from .anyres import pack_patches, views_of_crops
from .checks import resolve_budget
from .configuration_prunesid import NestsPruneSIDConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDLlavaNextConfig(NestsPruneSIDConfig, LlavaNextConfig):
    """
    [`LlavaNextConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop, or with
    `budget_scope="image"` of the whole image.
    """

    model_type = "prunesid_llava_next"


class PruneSIDLlavaNextModel(PrunedModelMixin, LlavaNextModel):
    """[`LlavaNextModel`] with a compressing `get_image_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLlavaNextConfig
    towers = {"image": "vision_tower"}
    projector_name = "multi_modal_projector"

    def views(self, modality, inputs, sizes):
        vision, pixels = self.config.vision_config, inputs["pixel_values"]
        views = [
            views_of_crops(size, self.config.image_grid_pinpoints, vision.image_size, vision.patch_size)
            for size in torch.as_tensor(inputs["image_sizes"]).tolist()
        ]
        if len(pixels) != (len(views) if pixels.dim() == 5 else sum(map(len, views))):
            raise ValueError(
                f"pixel_values of shape {tuple(pixels.shape)} do not fit {len(views)} image_sizes of "
                f"{sum(map(len, views))} crops in all. Pass those that the processor gave."
            )
        return views

    def sizes_of(self, modality, inputs):
        vision, grids = self.config.vision_config, self.config.image_grid_pinpoints
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        return [len(pack_patches(size, grids, vision.image_size, vision.patch_size)) for size in sizes]

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        """An image has at least the tokens of the crop that shows the whole of it."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return min(run_lengths) >= resolve_budget(self.config.prunesid_config.budget, patches)


class PruneSIDLlavaNextForConditionalGeneration(
    PrunedGenerationMixin, LlavaNextForConditionalGeneration, GenerationMixin
):
    """[`LlavaNextForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaNextModel


class PruneSIDLlavaNextProcessor(PrunedProcessorMixin, LlavaNextProcessor):
    """[`LlavaNextProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    _has_padded_views = True

    def view_lengths(self, modality, inputs, index, runs):
        return self.view_lengths_of_size(sum(runs), inputs["image_sizes"][index])

    def view_lengths_of_size(self, num_tokens, image_size):
        grids, crop_size = self.image_processor.image_grid_pinpoints, self.image_processor.crop_size["height"]
        views = views_of_crops([int(side) for side in image_size], grids, crop_size, self.patch_size)
        return [len(view.rows) for view in views]


PruneSIDLlavaNextAutoModel = register_family(PruneSIDLlavaNextForConditionalGeneration, PruneSIDLlavaNextProcessor)
