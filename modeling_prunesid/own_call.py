"""
Stock processors that write prompts in a `__call__` of their own, without upstream's `_process_images`.

The budget of a call is taken out of its arguments first, because nothing hands it on.
"""

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch

from .processing import OF_VIDEOS, PrunedProcessorMixin, check_request


class OwnCallProcessorMixin(PrunedProcessorMixin):
    """For a stock processor that asks itself for the text of each input. See [`PrunedProcessorMixin`]."""

    def __call__(self, *args, **kwargs):
        settings = {name: dict(kwargs[name]) for name in ("images_kwargs", "videos_kwargs") if kwargs.get(name)}
        kwargs |= settings
        asked = [given.pop("num_visual_tokens", None) for given in (kwargs, *settings.values())]
        asked = next((budget for budget in asked if budget is not None), None)
        check_request(asked)
        writer = copy.copy(self)
        writer.num_visual_tokens = self.num_visual_tokens if asked is None else asked
        output = writer._write_all(*args, **kwargs)
        self._question_reader = writer._question_reader
        return output

    def _write_all(self, *args, **kwargs):
        """What a call returns, by the saved budget."""
        return super().__call__(*args, **kwargs)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        text = super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self._write_one("image", image_inputs, image_idx, text)

    def replace_video_token(self, video_inputs, video_idx, **kwargs):
        text = super().replace_video_token(video_inputs, video_idx, **kwargs)
        return self._write_one("video", video_inputs, video_idx, text)

    def _write_one(self, modality: str, inputs: dict[str, Any], index: int, text: str) -> str:
        text = self._shorten(text, modality, inputs, index, None)
        if not self._writes_full(None):
            name = "num_visual_tokens" if modality == "image" else OF_VIDEOS
            inputs.setdefault(name, []).append(text.count(self._placeholder(modality)))
        return text


class ShorteningTokenizer:
    """Shortens texts in the list that it is given, and hands them to a tokenizer. All else is the tokenizer's."""

    def __init__(self, tokenizer: Any, shorten: Callable[[str], str]):
        self.tokenizer, self.shorten = tokenizer, shorten

    def __call__(self, texts, **kwargs):
        if isinstance(texts, list):
            texts[:] = [self.shorten(text) for text in texts]
        return self.tokenizer(texts, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


class SameTextProcessorMixin(OwnCallProcessorMixin):
    """
    For a stock processor that writes the same text for every image, whatever it shows. It is shortened where it enters
    the tokenizer. Also returns `num_tiles`; see [`TiledModelMixin`].
    """

    def tiles_of_an_image(self) -> list[int]:
        """The tokens of each tile of an image."""
        raise NotImplementedError

    def _write_all(self, images=None, text=None, **kwargs):
        tiles, token = self.tiles_of_an_image(), self.image_token
        kept = self._kept_of_views(tiles, None) or tiles

        def shorten(text):
            kept_of_runs = itertools.cycle(kept)
            return re.sub(f"(?:{re.escape(token)})+", lambda run: token * next(kept_of_runs), text)

        self.tokenizer = ShorteningTokenizer(self.tokenizer, shorten)
        output = super()._write_all(images=images, text=text, **kwargs)
        if "pixel_values" in output:
            texts, counts = [text] if isinstance(text, str) else text, {"num_tiles": len(tiles)}
            if not self._writes_full(None):
                counts["num_visual_tokens"] = sum(kept)
            num_images = sum(sample.count(token) for sample in texts)
            for name, count in counts.items():
                values = [count] * num_images
                output[name] = torch.tensor(values) if isinstance(output["input_ids"], torch.Tensor) else values
        return output

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_tiles"]
