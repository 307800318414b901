"""Images that upstream encodes as several tiles: what an image is, is known to the processor alone."""

from collections.abc import Sequence
from typing import Any

import torch

from .family import PrunedModelMixin
from .processing import PrunedProcessorMixin


class TiledModelMixin(PrunedModelMixin):
    """
    For inputs that are encoded as several tiles, each a view: those of an image, or chunks of a clip.
    `get_*_features`, `forward` and `generate` also take `num_tiles` (images) and `num_video_tiles` (clips),
    `torch.LongTensor` of shape `(num_inputs,)`, *optional*: how many tiles each of them has, as our processor returns
    it. Without it each tile is an input of its own.
    """

    own_arguments = ("num_tiles", "num_video_tiles")
    # The modalities that are encoded as tiles.
    tiled: Sequence[str] = ("image",)

    def tiles(self, inputs: dict[str, Any], sizes: list[int]) -> list[int]:
        """Tokens of each tile of all inputs, for `sizes` of the entries of upstream's output."""
        return sizes

    def views(self, modality, inputs, sizes):
        if modality not in self.tiled:
            return super().views(modality, inputs, sizes)
        name = "num_tiles" if modality == "image" else "num_video_tiles"
        tiles, counts = self.tiles(inputs, sizes), inputs.get(name)
        if counts is None:
            if self.config.prunesid_config.budget_scope == "image":
                raise ValueError(
                    f"prunesid_config.budget_scope='image' counts the tokens of a whole {modality}, and it is not "
                    f"known which of these {len(tiles)} tiles are one. Pass {name}, as our processor returns it."
                )
            return [[size] for size in tiles]
        counts = torch.as_tensor(counts).tolist()
        if sum(counts) != len(tiles) or min(counts) < 1:
            raise ValueError(
                f"{name} must say how many of the {len(tiles)} encoded tiles each {modality} has, got {counts}. Pass "
                "it as our processor returns it, with the pixels of the same call."
            )
        every = iter(tiles)
        return [[next(every) for _ in range(count)] for count in counts]

    def num_images(self, inputs):
        counts = inputs.get("num_tiles")
        return super().num_images(inputs) if counts is None else len(counts)


class TiledProcessorMixin(PrunedProcessorMixin):
    """
    For images that are cut into tiles, each a view. Also returns `num_tiles`, a tensor of shape `(num_images,)`, by
    which the model knows what an image is. See [`PrunedProcessorMixin`].
    """

    def num_tiles(self, modality: str, inputs: dict, index: int, runs: list[int]) -> int:
        """How many tiles one input has. By default each run of placeholders is one."""
        return len(runs)

    def view_lengths(self, modality, inputs, index, runs):
        count = self.num_tiles(modality, inputs, index, runs)
        return runs if count == len(runs) else [sum(runs) // count] * count

    def _process_images(self, images, num_visual_tokens: int | float | None = None, **kwargs):
        inputs, texts = super()._process_images(images, num_visual_tokens=num_visual_tokens, **kwargs)
        stock = super(PrunedProcessorMixin, self).replace_image_token
        runs = [self._runs(stock(inputs, index, **kwargs), "image") for index in range(len(texts))]
        inputs["num_tiles"] = [self.num_tiles("image", inputs, index, own) for index, own in enumerate(runs)]
        return inputs, texts

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_tiles"]
