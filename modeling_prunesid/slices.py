"""MiniCPM-V: images and frames in slices of any size, whose patches a tower merges in its middle and behind it."""

import math

import torch

from .tiles import TiledModelMixin


class SlicedModelMixin(TiledModelMixin):
    """For slices of images and of frames, each a tile. See [`TiledModelMixin`]."""

    tiled = ("image", "video")

    def _sizes(self, modality, inputs):
        return torch.as_tensor(inputs["target_sizes" if modality == "image" else "target_sizes_videos"])

    def sizes_of(self, modality, inputs):
        side = self.config.merge_kernel_size[0] ** self.config.merger_times
        side *= 1 if (inputs.get("downsample_mode") or self.config.downsample_mode) == "4x" else 2
        frames = 1 if modality == "image" else len(inputs["pixel_values_videos"])
        return (self._sizes(modality, inputs) // side).prod(-1).tolist() * frames

    def patch_grids(self, modality, inputs, num_patches):
        sizes = self._sizes(modality, inputs)
        side = math.isqrt(int(sizes.prod(-1).sum()) // num_patches)
        return torch.nn.functional.pad(sizes // side, (1, 0), value=1)
