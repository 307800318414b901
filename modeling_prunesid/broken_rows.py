"""Images whose tokens are written row by row, each row a run of placeholders with a break behind it."""

from typing import Any

import torch

from .connector import BehindConnectorModelMixin


class BrokenRowsModelMixin(BehindConnectorModelMixin):
    """A view is a grid of tokens. Each row of an image's grids is a run of placeholders."""

    def grids(self, modality: str, inputs: dict[str, Any]) -> list[list[tuple[int, int]]] | None:
        """
        Rows and columns of each view of each input; None without what says so. By default an image has one grid, of
        its `image_sizes` in merged patches.
        """
        if "image_sizes" not in inputs:
            return None
        side = self.config.vision_config.patch_size * self.config.spatial_merge_size
        return [[tuple(sides)] for sides in (torch.as_tensor(inputs["image_sizes"]) // side).tolist()]

    def views(self, modality, inputs, sizes):
        return [[rows * columns for rows, columns in own] for own in self.grids(modality, inputs)]

    def sizes_of(self, modality, inputs):
        return [sum(own) for own in self.views(modality, inputs, None)]

    def runs_of(self, modality, views, inputs):
        grids = self.grids(modality, inputs)
        if modality == "video" or grids is None:
            return super().runs_of(modality, views, inputs)
        return [[columns for rows, columns in own for _ in range(rows)] for own in grids]
