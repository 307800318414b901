"""Images whose crops are encoded apart (`pixel_values_local`), and then the whole of them, smaller."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from .connector import BehindConnectorModelMixin
from .processing import PrunedProcessorMixin
from .views import View, as_views


class LocalCropsModelMixin(BehindConnectorModelMixin):
    """
    A view is a crop or the whole image, which comes behind its crops, and before its separators. The tower encodes all
    whole images before all crops. `num_local_patches` says how many crops each image has.
    """

    num_separators = 0  # tokens of no view behind an image

    def num_crops(self, inputs: dict[str, Any]) -> list[int]:
        """How many crops each image has."""
        counts = inputs.get("num_local_patches") if inputs.get("pixel_values_local") is not None else None
        return [0] * len(inputs["pixel_values"]) if counts is None else torch.as_tensor(counts).tolist()

    def side_of(self, pixels: torch.Tensor) -> int:
        """The side of the grid of the tower's patches of whole images or of crops `(number, channels, side, side)`."""
        sam = self.config.vision_config.sam_config
        return pixels.shape[-1] // sam.patch_size // 4

    def tokens_of(self, pixels: torch.Tensor) -> int:
        """The tokens of each whole image or crop."""
        return self.side_of(pixels) ** 2

    def views(self, modality, inputs, sizes):
        counts = self.num_crops(inputs)
        crop = self.tokens_of(inputs["pixel_values_local"]) if sum(counts) else 0
        wholes = [size - self.num_separators - crop * count for size, count in zip(sizes, counts)]
        lengths = [[crop] * count + [whole] for whole, count in zip(wholes, counts)]
        return [as_views(own) for own in lengths] if self.num_separators else lengths

    def sizes_of(self, modality, inputs):
        counts = self.num_crops(inputs)
        crop = self.tokens_of(inputs["pixel_values_local"]) if sum(counts) else 0
        whole = self.tokens_of(inputs["pixel_values"]) + self.num_separators
        return [whole + crop * count for count in counts]

    def pool_attention(self, patches, modality, inputs, num_tokens):
        counts = self.num_crops(inputs)
        num_whole = len(counts) * self.side_of(inputs["pixel_values"]) ** 2
        wholes = self.pool_views(patches[:num_whole].view(len(counts), -1))
        crops = iter(self.pool_views(patches[num_whole:].view(sum(counts), -1)) if sum(counts) else ())
        views = ((*itertools.islice(crops, count), whole) for whole, count in zip(wholes, counts))
        return torch.cat([view for own in views for view in own])

    def pool_views(self, patches: torch.Tensor) -> torch.Tensor:
        """The attention `(views, tokens)` of that of the patches `(views, patches)`; by default each is a token."""
        return patches


class NewlineCropsModelMixin(LocalCropsModelMixin):
    """The crops of an image lie row by row, with a newline token behind each row, and a separator behind the image."""

    def owners(self, inputs: dict[str, Any]) -> Iterator[torch.LongTensor]:
        """Of each image the crop `(T,)` of each token; the whole image is the last, newlines and separator have -1."""
        for index, count in enumerate(self.num_crops(inputs)):
            owners = _owners_of_grid(1, 1, self.side_of(inputs["pixel_values"]), first=count)
            if count:
                columns, rows = (int(number) for number in inputs["patches_grid"][index])
                crops = _owners_of_grid(rows, columns, self.side_of(inputs["pixel_values_local"]))
                owners = torch.cat([crops, owners])
            yield torch.nn.functional.pad(owners, (0, 1), value=-1)

    def views(self, modality, inputs, sizes):
        every = self.owners(inputs)
        return [[View((own == crop).nonzero()[:, 0]) for crop in range(int(own.max()) + 1)] for own in every]

    def sizes_of(self, modality, inputs):
        return list(map(len, self.owners(inputs)))


def _owners_of_grid(rows: int, columns: int, side: int, first: int = 0) -> torch.LongTensor:
    crops = torch.arange(first, first + rows * columns).view(rows, 1, columns, 1).expand(-1, side, -1, side)
    return torch.nn.functional.pad(crops.reshape(rows * side, columns * side), (0, 1), value=-1).flatten()


class LocalCropsProcessorMixin(PrunedProcessorMixin):
    """The crops of an image, then the whole of it; newlines and separators are of no view."""

    def view_lengths(self, modality, inputs, index, runs):
        count = int(inputs["num_local_patches"][index])
        crops = [inputs["pixel_values_local"][0]] * count if count else []
        sides = [own.shape[-1] // self.patch_size for own in (*crops, inputs["pixel_values"][index])]
        return [math.ceil(side / self.downsample_ratio) ** 2 for side in sides]
