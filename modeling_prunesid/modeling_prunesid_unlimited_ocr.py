"""Unlimited-OCR with PruneSID: tokens are compared as they enter the language model."""

import itertools
import math

import torch
from transformers import (
    GenerationMixin,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrModel,
    UnlimitedOcrProcessor,
)

from .budgets import View
from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDUnlimitedOcrConfig(BehindConnectorConfig, UnlimitedOcrConfig):
    """[`UnlimitedOcrConfig`] with a nested [`PruneSIDConfig`]: the budget of each crop and of the whole image."""

    model_type = "prunesid_unlimited_ocr"


class PruneSIDUnlimitedOcrModel(PrunedModelMixin, UnlimitedOcrModel):
    """[`UnlimitedOcrModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDUnlimitedOcrConfig
    tower_name = "vision_tower.vision_encoder"

    def views(self, modality, inputs, sizes):
        """The grid of crops, row by row with a newline token behind each, then the whole image, then a separator."""
        counts, views = inputs.get("num_local_patches") or [0] * len(sizes), []
        for index, (size, count) in enumerate(zip(sizes, counts)):
            grids, whole = [], size - 1
            if count:
                columns, rows = (int(number) for number in inputs["patches_grid"][index])
                side = self._side_of(inputs["pixel_values_local"])
                crops = torch.arange(count).view(rows, 1, columns, 1).expand(-1, side, -1, side)
                grids.append(crops.reshape(rows * side, columns * side))
                whole -= grids[0].numel() + len(grids[0])
            side = self._side_of(inputs["pixel_values"])
            assert whole == side * (side + 1)
            grids.append(torch.full((side, side), count))
            owners = torch.cat([torch.nn.functional.pad(grid, (0, 1), value=-1).flatten() for grid in grids])
            views.append([View((owners == crop).nonzero()[:, 0]) for crop in range(count + 1)])
        return views

    def _side_of(self, pixels):
        sam = self.config.vision_config.sam_config
        return pixels.shape[-1] // sam.patch_size // 4

    def pool_attention(self, patches, modality, inputs, num_tokens):
        """Each token is a patch, but the tower encodes whole images before all crops."""
        counts = inputs.get("num_local_patches") or [0] * len(inputs["pixel_values"])
        num_whole = len(counts) * self._side_of(inputs["pixel_values"]) ** 2
        whole, crops = patches[:num_whole].view(len(counts), -1), patches[num_whole:]
        crops = iter(crops.view(sum(counts), -1)) if sum(counts) else iter(())
        return torch.cat(
            [part for count, own in zip(counts, whole) for part in [*itertools.islice(crops, count), own]]
        )


class PruneSIDUnlimitedOcrForConditionalGeneration(
    PrunedGenerationMixin, UnlimitedOcrForConditionalGeneration, GenerationMixin
):
    """[`UnlimitedOcrForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDUnlimitedOcrModel


class PruneSIDUnlimitedOcrProcessor(PrunedProcessorMixin, UnlimitedOcrProcessor):
    """[`UnlimitedOcrProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        """The crops, then the whole image; the newline behind each row and the separator are of no view."""
        size, tile = self.image_processor.size, self.image_processor.tile_size
        sides = (tile, max(size["height"], size["width"]))
        crop, whole = (math.ceil(side // self.patch_size / self.downsample_ratio) ** 2 for side in sides)
        return [crop] * int(inputs["num_local_patches"][index]) + [whole]


PruneSIDUnlimitedOcrAutoModel = register_family(
    PruneSIDUnlimitedOcrForConditionalGeneration, PruneSIDUnlimitedOcrProcessor
)
