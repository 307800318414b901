"""The any-resolution crops of LLaVA-NeXT: which patch each placeholder of an image stands for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image


NEWLINE = -1


@dataclass
class PackedImage:
    """
    An image as upstream packs it (`spatial_unpad`): the crop that shows the whole image, then the grid of the other
    crops row by row, without the rows or columns of padding, and a newline token after each row.

    Args:
        placeholders (`torch.LongTensor` of shape `(T,)`):
            `crop * patches_of_a_crop + patch` of each placeholder; -1 for a newline token.
        crops (`list[torch.LongTensor]`):
            The patches of each crop that remain after unpadding, ascending.
        patches_of_a_crop (`int`): before unpadding.
    """

    placeholders: torch.LongTensor
    crops: list[torch.LongTensor]
    patches_of_a_crop: int

    @classmethod
    def from_size(
        cls, image_size: Sequence[int], grid_pinpoints: list[list[int]], crop_size: int, patch_size: int
    ) -> "PackedImage":
        """
        Args:
            image_size (`tuple[int, int]`): height and width of the image, in pixels.
            grid_pinpoints (`list[list[int]]`): resolutions of the grids to choose from.
            crop_size (`int`), patch_size (`int`): side of a crop and of a patch, in pixels.
        """
        side = crop_size // patch_size
        rows, columns = get_anyres_image_grid_shape(list(image_size), grid_pinpoints, crop_size)
        whole, grid = torch.arange((1 + rows * columns) * side**2).split([side**2, rows * columns * side**2])
        grid = grid.view(rows, columns, side, side).transpose(1, 2).reshape(1, rows * side, columns * side)
        grid = unpad_image(grid, list(image_size))[0]
        newlines = torch.full((len(grid), 1), NEWLINE)
        remaining = torch.cat([whole, grid.flatten()])
        return cls(
            torch.cat([whole, torch.cat([grid, newlines], dim=1).flatten()]),
            [remaining[remaining // side**2 == crop] % side**2 for crop in range(1 + rows * columns)],
            side**2,
        )

    def keep(
        self, kept: Sequence[torch.LongTensor], num_prefix: int, keep_cls: bool
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Packs the kept tokens in upstream's order. If all patches are kept, newline tokens are, and CLS tokens are not,
        as upstream has it. Otherwise CLS tokens, one of each crop that has patches, may be kept: that of the whole
        image comes before its patches, the others before the grid.

        Args:
            kept (`list[torch.LongTensor]`): the kept patches of each crop, among `crops`.
            num_prefix (`int`): how many tokens the tower has before the patches of a crop.
            keep_cls (`bool`): whether CLS tokens are kept as well.

        Returns:
            Two tensors of shape `(N,)`: the placeholder of each kept token (-1 for CLS), and its row among the tower's
            tokens of all crops (-1 for a newline token).
        """
        length = num_prefix + self.patches_of_a_crop
        is_whole = sum(map(len, kept)) == sum(map(len, self.crops))
        if is_whole:
            placeholders = torch.arange(len(self.placeholders))
        else:
            is_kept = torch.zeros(len(self.crops) * self.patches_of_a_crop + 1, dtype=torch.bool)  # the last: newline
            for crop, patches in enumerate(kept):
                is_kept[crop * self.patches_of_a_crop + patches] = True
            placeholders = is_kept[self.placeholders].nonzero()[:, 0]
        patches = self.placeholders[placeholders]
        crops, patches = patches.div(self.patches_of_a_crop, rounding_mode="floor"), patches % self.patches_of_a_crop
        rows = torch.where(crops < 0, NEWLINE, crops * length + num_prefix + patches)
        if is_whole or not keep_cls:
            return placeholders, rows
        with_cls = torch.tensor([crop for crop, patches in enumerate(self.crops) if len(patches)])
        no_place, of_whole = torch.full_like(with_cls, -1), len(kept[0])
        return (
            torch.cat([no_place[:1], placeholders[:of_whole], no_place[1:], placeholders[of_whole:]]),
            torch.cat([with_cls[:1] * length, rows[:of_whole], with_cls[1:] * length, rows[of_whole:]]),
        )
