"""Idefics2 with PruneSID: tokens are compared as they enter the language model."""

import copy
import itertools
import re

import torch
from transformers import (
    GenerationMixin,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Model,
    Idefics2Processor,
)

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, register_family
from .processing import PrunedProcessorMixin, check_request
from .tiles import TiledModelMixin


class PruneSIDIdefics2Config(BehindConnectorConfig, Idefics2Config):
    """
    [`Idefics2Config`] with a nested [`PruneSIDConfig`], whose budget is that of each tile, or image where images
    are not split.
    """

    model_type = "prunesid_idefics2"


class PruneSIDIdefics2Model(TiledModelMixin, Idefics2Model):
    """[`Idefics2Model`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDIdefics2Config

    def tile_length(self, inputs):
        return self.config.perceiver_config.resampler_n_latents


class PruneSIDIdefics2ForConditionalGeneration(
    PrunedGenerationMixin, Idefics2ForConditionalGeneration, GenerationMixin
):
    """[`Idefics2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDIdefics2Model


class _ShorteningTokenizer:
    """Shortens texts in the list that it is given, and hands them to a tokenizer. All else is the tokenizer's."""

    def __init__(self, tokenizer, shorten):
        self.tokenizer, self.shorten = tokenizer, shorten

    def __call__(self, texts, **kwargs):
        texts[:] = [self.shorten(text) for text in texts]
        return self.tokenizer(texts, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


class PruneSIDIdefics2Processor(PrunedProcessorMixin, Idefics2Processor):
    """
    [`Idefics2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]. Also returns `num_tiles`; see
    [`TiledModelMixin`].
    """

    def __call__(self, images=None, text=None, **kwargs):
        kwargs["images_kwargs"] = dict(kwargs.get("images_kwargs") or {})
        asked = [own.pop("num_visual_tokens", None) for own in (kwargs, kwargs["images_kwargs"])]
        budget = next((value for value in asked if value is not None), None)
        check_request(budget)
        views = [self.image_seq_len] * (5 if self.image_processor.do_image_splitting else 1)
        kept = self._kept_of_views(views, budget) or views
        writer, token = copy.copy(self), self.image_token

        def shorten(text):
            kept_of_runs = itertools.cycle(kept)
            return re.sub(f"(?:{re.escape(token)})+", lambda run: token * next(kept_of_runs), text)

        writer.tokenizer = _ShorteningTokenizer(self.tokenizer, shorten)
        output = Idefics2Processor.__call__(writer, images=images, text=text, **kwargs)
        if "pixel_values" in output:
            texts, counts = [text] if isinstance(text, str) else text, {"num_tiles": len(views)}
            if self.num_visual_tokens is not None or budget is not None:
                counts["num_visual_tokens"] = sum(kept)
            num_images = sum(sample.count(token) for sample in texts)
            for name, count in counts.items():
                values = [count] * num_images
                output[name] = torch.tensor(values) if isinstance(output["input_ids"], torch.Tensor) else values
        return output

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_tiles"]


PruneSIDIdefics2AutoModel = register_family(PruneSIDIdefics2ForConditionalGeneration, PruneSIDIdefics2Processor)
