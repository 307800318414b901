"""The any-resolution crops of the LLaVA-NeXT families: which patch of which crop each token of an image is."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from .budgets import View
from .family import PrunedModelMixin


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


def crops_of_images(config: Any, image_sizes: torch.LongTensor, is_cropped: Sequence[bool] | None = None) -> list[int]:
    """How many crops each image has. Arguments are those of `packed_views`."""
    pinpoints, size = config.image_grid_pinpoints, config.vision_config.image_size
    is_cropped = [True] * len(image_sizes) if is_cropped is None else is_cropped
    return [image_size_to_num_patches(own, pinpoints, size) if cut else 1 for own, cut in zip(image_sizes, is_cropped)]


def packed_scores(
    pack: Callable,
    config: Any,
    image_sizes: torch.LongTensor,
    scores: torch.Tensor,
    is_cropped: Sequence[bool] | None = None,
    **options: Any,
) -> torch.Tensor:
    """
    Scores `(crops, tokens)` of all crops, laid out and interpolated as upstream does features, of the tokens of the
    `packed_views`, one view behind the other. Arguments are otherwise those of `packed_views`.
    """
    sizes = torch.as_tensor(image_sizes).cpu()
    counts = crops_of_images(config, sizes, is_cropped)
    side = math.isqrt(scores.shape[1])
    views = packed_views(pack, config, sizes, is_cropped, side, **options)
    of_views = []
    for own, size, crops in zip(views, sizes, scores.split(counts)):
        packed = pack([crops[..., None]], size[None], image_newline=scores.new_zeros(1), **options)[0]
        packed = (packed[0] if isinstance(packed, list) else packed)[:, 0]
        of_views += [packed[view.rows.to(packed.device)] for view in own]
    return torch.cat(of_views)


def packed_owners(
    pack: Callable,
    config: Any,
    image_sizes: torch.LongTensor,
    is_cropped: Sequence[bool] | None = None,
    side: int | None = None,
    **options: Any,
) -> list[torch.LongTensor]:
    """
    The crop `(T,)` of each token of images that upstream's `pack_image_features` lays out, found by packing one-hot
    crops in place of features. A token that was interpolated between crops is of the one of most weight; newlines have
    -1.

    Args:
        pack (`Callable`): upstream's `pack_image_features`.
        config: of the model, with `image_grid_pinpoints`, and `image_size` and `patch_size` in its `vision_config`.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): height and width, in pixels.
        is_cropped (`list[bool]`, *optional*): False for images that are a single crop, whatever their size.
        side (`int`, *optional*): of the grid of a crop, in tokens; by default in patches.
        options: further arguments of `pack`.
    """
    vision = config.vision_config
    side, found = side or vision.image_size // vision.patch_size, []
    sizes = torch.as_tensor(image_sizes).cpu()
    for size, count in zip(sizes, crops_of_images(config, sizes, is_cropped)):
        owners = torch.eye(count + 1)
        crops = owners[:count, None].expand(-1, side**2, -1)
        packed = pack([crops], size[None], image_newline=owners[count], **options)[0]
        owner = (packed[0] if isinstance(packed, list) else packed).argmax(-1)
        found.append(owner.masked_fill(owner == count, NEWLINE))
    return found


def packed_views(pack: Callable, config: Any, image_sizes: torch.LongTensor, *args, **options) -> list[list[View]]:
    """A view for each crop of images that upstream lays out. Arguments are those of `packed_owners`."""
    views = []
    for owner in packed_owners(pack, config, image_sizes, *args, **options):
        of_crops = [(owner == crop).nonzero()[:, 0] for crop in range(int(owner.max()) + 1)]
        views.append([View(rows) for rows in of_crops if len(rows)])
    return views


class PackedModelMixin(PrunedModelMixin):
    """
    For images of crops, each a view, that upstream's `pack_image_features` lays out, and videos of frames. Newline
    tokens are of no view.
    """

    def layout(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Further arguments of `packed_owners`."""
        return {"vision_feature_select_strategy": "full"}

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return packed_views(self.pack_image_features, self.config, inputs["image_sizes"], **self.layout(inputs))
        frames = inputs["pixel_values_videos"].shape[1]
        return [[size // frames] * frames for size in sizes]

    def sizes_of(self, modality, inputs):
        if modality == "video":
            return None
        sizes = inputs["image_sizes"]
        return list(map(len, packed_owners(self.pack_image_features, self.config, sizes, **self.layout(inputs))))

    def pool_attention(self, patches, modality, inputs, num_tokens):
        if modality == "video":
            return super().pool_attention(patches, modality, inputs, num_tokens)
        vision = self.config.vision_config
        crops, sizes = patches.view(-1, (vision.image_size // vision.patch_size) ** 2), inputs["image_sizes"]
        return packed_scores(self.pack_image_features, self.config, sizes, crops, **self.layout(inputs))
