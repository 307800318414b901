"""Clips of which upstream's processor drops tokens already, those that hardly change, by `video_compression_mask`."""

from typing import Any

import torch

from .connector import BehindConnectorModelMixin


class MaskedClipsModelMixin(BehindConnectorModelMixin):
    """
    A view is an image, or what is left of a frame.

    Upstream's `forward` applies `video_compression_mask`, a `torch.BoolTensor` `(tokens,)` of all clips, but PruneSID
    chooses of the tokens that it leaves.
    """

    views_apart = ("video",)
    own_arguments = ("video_compression_mask",)

    def masks(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Which tokens `(frames, tokens)` of each clip are left, on the host."""
        grids, mask = inputs["video_grid_thw"], inputs.get("video_compression_mask")
        sizes = (grids.prod(1) // inputs["video_merge_sizes"] ** 2).tolist()
        masks = (torch.ones(sum(sizes), dtype=torch.bool) if mask is None else mask.cpu()).split(sizes)
        return [own.view(frames, -1) for own, frames in zip(masks, grids[:, 0].tolist())]

    def left_of(self, modality: str, inputs: dict[str, Any], tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        """What is left of the tokens `(tokens, ...)` of each input: all of an image."""
        if modality == "image":
            return tokens
        return [own[mask.flatten().to(own.device)] for own, mask in zip(tokens, self.masks(inputs))]

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        return [[left for left in mask.sum(1).tolist() if left] for mask in self.masks(inputs)]

    def sizes_of(self, modality, inputs):
        if modality == "image":
            return (inputs["image_grid_thw"].prod(1) // inputs["image_merge_sizes"] ** 2).tolist()
        return [int(mask.sum()) for mask in self.masks(inputs)]

    def _encode(self, modality, encode, num_visual_tokens, inputs):
        def encode_what_is_left(**arguments):
            output = encode(**arguments)
            output.pooler_output = self.left_of(modality, inputs, output.pooler_output)
            return output

        return super()._encode(modality, encode_what_is_left, num_visual_tokens, inputs)
