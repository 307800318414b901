"""Grids whose rows end with a newline token each, which leaves with the first token that is dropped."""

from typing import Any

import torch

from .grids import GridModelMixin, GridProcessorMixin
from .views import View


class NewlineGridModelMixin(GridModelMixin):
    """A view is a frame without its newlines, and without the tokens around it."""

    views_apart = ()
    has_raster_patches = True
    num_around = 0  # tokens before a frame, and as many behind it

    def grids(self, modality: str, inputs: dict[str, Any]) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of the tokens of each input."""
        merged = self.config.vision_config.spatial_merge_size
        grids = inputs[f"{modality}_grid_thw"].tolist()
        return [(frames, height // merged, width // merged) for frames, height, width in grids]

    def length(self, height: int, width: int) -> int:
        """All tokens of a frame."""
        return height * (width + 1) + 2 * self.num_around

    def sizes_of(self, modality, inputs):
        return [frames * self.length(*sides) for frames, *sides in self.grids(modality, inputs)]

    def views(self, modality, inputs, sizes):
        views = []
        for frames, height, width in self.grids(modality, inputs):
            rows = torch.arange(height * (width + 1)).view(height, width + 1)[:, :width].flatten() + self.num_around
            views.append([View(rows + frame * self.length(height, width)) for frame in range(frames)])
        return views


class NewlineGridProcessorMixin(GridProcessorMixin):
    """A view is a frame; newlines are of none."""

    def view_lengths(self, modality, inputs, index, runs):
        merged = getattr(self, f"{modality}_processor").merge_size
        frames, height, width = map(int, inputs[f"{modality}_grid_thw"][index])
        return [(height // merged) * (width // merged)] * frames
