"""
The crops of LLaVA-NeXT, whose tokens are chosen in the vision tower: which patch of which crop each token
of an image is.
"""

from collections.abc import Sequence

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from .checks import resolve_budget
from .encoding import TowerModelMixin
from .processing import PrunedProcessorMixin
from .views import View


NEWLINE = -1


def pack_patches(
    image_size: Sequence[int], grid_pinpoints: list[list[int]], crop_size: int, patch_size: int
) -> torch.LongTensor:
    """
    The tokens of an image as upstream packs them (`spatial_unpad`): the crop that shows the whole image, then the grid
    of the other crops row by row, without the rows or columns of padding, and a newline token after each row.

    Args:
        image_size (`tuple[int, int]`): height and width of the image, in pixels.
        grid_pinpoints (`list[list[int]]`): resolutions of the grids to choose from.
        crop_size (`int`), patch_size (`int`): side of a crop and of a patch, in pixels.

    Returns:
        `torch.LongTensor` of shape `(T,)`: `crop * patches_of_a_crop + patch` of each token; -1 for a newline token.
    """
    side = crop_size // patch_size
    rows, columns = get_anyres_image_grid_shape(list(image_size), grid_pinpoints, crop_size)
    whole, grid = torch.arange((1 + rows * columns) * side**2).split([side**2, rows * columns * side**2])
    grid = grid.view(rows, columns, side, side).transpose(1, 2).reshape(1, rows * side, columns * side)
    grid = unpad_image(grid, list(image_size))[0]
    newlines = torch.full((len(grid), 1), NEWLINE)
    return torch.cat([whole, torch.cat([grid, newlines], dim=1).flatten()])


def views_of_crops(
    image_size: Sequence[int], grid_pinpoints: list[list[int]], crop_size: int, patch_size: int
) -> list[View]:
    """A view for each crop of an image, of its patches that are no padding. Arguments are those of `pack_patches`."""
    packed, patches = pack_patches(image_size, grid_pinpoints, crop_size, patch_size), (crop_size // patch_size) ** 2
    rows, columns = get_anyres_image_grid_shape(list(image_size), grid_pinpoints, crop_size)
    crops = packed.div(patches, rounding_mode="floor")
    views = []
    for crop in range(1 + rows * columns):
        own = (crops == crop).nonzero()[:, 0]
        views.append(View(own, packed[own] % patches, cls_at=min(crop, 1) * patches))
    return views


class TowerCropsModelMixin(TowerModelMixin):
    """
    A view is a crop of an image, of its patches that are no padding.

    Kept tokens stay in upstream's order: those of the crop that shows the whole image, then those of the other crops
    in the raster order of the whole image. Patches of padding, which upstream removes, take no part. An image keeps
    all patches and newline tokens, or exactly its budget and no newline token.
    """

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


class TowerCropsProcessorMixin(PrunedProcessorMixin):
    """For the processor of a [`TowerCropsModelMixin`]."""

    _has_padded_views = True

    def view_lengths(self, modality, inputs, index, runs):
        return self.view_lengths_of_size(sum(runs), inputs["image_sizes"][index])

    def view_lengths_of_size(self, num_tokens, image_size):
        grids, crop_size = self.image_processor.image_grid_pinpoints, self.image_processor.crop_size["height"]
        views = views_of_crops([int(side) for side in image_size], grids, crop_size, self.patch_size)
        return [len(view.rows) for view in views]
