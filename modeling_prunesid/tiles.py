"""Images that upstream encodes as several tiles: what an image is, is known to the processor alone."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from .connector import BehindConnectorModelMixin
from .processing import PrunedProcessorMixin


class TiledModelMixin(BehindConnectorModelMixin):
    """
    For inputs that are encoded as several tiles, each a view: those of an image, or chunks of a clip.
    `get_*_features`, `forward` and `generate` also take `num_tiles` (images) and `num_video_tiles` (clips),
    `torch.LongTensor` of shape `(num_inputs,)`, *optional*: how many tiles each of them has, as our processor returns
    it. Without it each tile is an input of its own.
    """

    own_arguments = ("num_tiles", "num_video_tiles")
    # The modalities that are encoded as tiles.
    tiled: Sequence[str] = ("image",)
    views_apart: Sequence[str] = ("image", "video")

    def tile_length(self, inputs: dict[str, Any]) -> int | None:
        """Tokens of a tile; None where each entry of upstream's output is one."""
        return None

    def sizes_of(self, modality, inputs):
        length, counts = (
            self.tile_length(inputs),
            inputs.get("num_tiles" if modality == "image" else "num_video_tiles"),
        )
        if length is None or counts is None:
            return super().sizes_of(modality, inputs)
        return [length * count for count in torch.as_tensor(counts).tolist()]

    def views(self, modality, inputs, sizes):
        if modality not in self.tiled:
            return super().views(modality, inputs, sizes)
        name = "num_tiles" if modality == "image" else "num_video_tiles"
        length, counts = self.tile_length(inputs), inputs.get(name)
        tiles = sizes if length is None else [length] * (sum(sizes) // length)
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
    For inputs that are encoded as several tiles, each a view. Also returns `num_tiles` and `num_video_tiles`, tensors
    of shape `(num_images,)` and `(num_videos,)`, by which the model knows what an input is. See
    [`PrunedProcessorMixin`].
    """

    # Videos are handed to the model as images, a tile for each frame.
    _videos_are_images = False
    # Upstream's processor takes images one behind the other; a list for each text, as chats make it, is joined.
    _joins_images = False

    def num_tiles(self, modality: str, inputs: dict, index: int, runs: list[int]) -> int:
        """How many tiles one input has. By default each run of placeholders is one."""
        return len(runs)

    def view_lengths(self, modality, inputs, index, runs):
        count = self.num_tiles(modality, inputs, index, runs)
        return runs if count == len(runs) else [sum(runs) // count] * count

    def _placeholder(self, modality):
        return super()._placeholder("image" if self._videos_are_images else modality)

    def _write(self, modality, inputs, texts, num_visual_tokens):
        runs = [self._runs(text, modality) for text in texts]
        name = "num_tiles" if modality == "image" else "num_video_tiles"
        inputs[name] = [self.num_tiles(modality, inputs, index, own) for index, own in enumerate(runs)]
        return super()._write(modality, inputs, texts, num_visual_tokens)

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        if self._joins_images and not kwargs.get("multi_page") and isinstance(images, (list, tuple)):
            images = [image for own in images for image in (own if isinstance(own, (list, tuple)) else [own])]
        arguments = {"images": images, "text": text, "videos": videos}
        given = {name: value for name, value in arguments.items() if value is not None}
        output = super().__call__(**given, **kwargs)
        if self._videos_are_images and "num_video_tiles" in output:
            self._join(output, [text] if isinstance(text, str) else text)
        return output

    def _join(self, output: Any, texts: list[str]) -> None:
        """Orders what is returned for images and for videos as they come in the texts."""
        of_images, of_videos = (list(output.pop(name, ())) for name in ("num_tiles", "num_video_tiles"))
        pattern = f"{re.escape(self.image_token)}|{re.escape(self.video_token)}"
        is_video = [match == self.video_token for sample in texts for match in re.findall(pattern, sample)]
        places: list[int] = []
        for video in is_video:
            earlier = sum(other == video for other in is_video[: len(places)])
            places.append(len(of_images) + earlier if video else earlier)
        joined = {"num_tiles": [*of_images, *of_videos]}
        if output.get("num_visual_tokens") is not None:
            joined["num_visual_tokens"] = list(output["num_visual_tokens"])
        for name, values in joined.items():
            ordered = [int(values[place]) for place in places]
            output[name] = torch.tensor(ordered) if isinstance(output["input_ids"], torch.Tensor) else ordered

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_tiles"]
