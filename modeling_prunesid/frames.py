"""Clips of frames (or slices) that are views of as many tokens each, one behind the other."""

from typing import Any

from .connector import BehindConnectorModelMixin
from .processing import PrunedProcessorMixin
from .views import as_views


class FramesModelMixin(BehindConnectorModelMixin):
    """For `pixel_values_videos` of shape `(videos, frames, channels, height, width)`."""

    num_separators = 0  # tokens of no view behind a clip

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        shape = tuple(inputs["pixel_values_videos"].shape)
        if len(shape) != 5:
            raise ValueError(
                "pixel_values_videos must be (videos, frames or slices, channels, height, width), as processors of "
                f"Transformers 5.24 and later make them, got {shape}. Upgrade Transformers, or set budget=None for "
                "videos."
            )
        lengths = [[(size - self.num_separators) // shape[1]] * shape[1] for size in sizes]
        return [as_views(own) for own in lengths] if self.num_separators else lengths

    def tokens_of_frame(self, inputs: dict[str, Any]) -> int | None:
        """The tokens of a frame, where they are known before the tower runs."""
        return None

    def sizes_of(self, modality, inputs):
        length = self.tokens_of_frame(inputs)
        if modality == "image" or length is None:
            return super().sizes_of(modality, inputs)
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        return [frames * length + self.num_separators] * videos


class FramesProcessorMixin(PrunedProcessorMixin):
    """A view is an entry of an input's pixels: a frame of a clip, or a tile of an image."""

    num_separators = 0

    def view_lengths(self, modality, inputs, index, runs):
        count = len(inputs["pixel_values" if modality == "image" else "pixel_values_videos"][index])
        return [(sum(runs) - self.num_separators) // count] * count
