"""Idefics2 with PruneSID: tokens are compared as they enter the language model."""

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
from .processing import VariantProcessorMixin
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

    def tiles(self, inputs, sizes):
        num_tokens = self.config.perceiver_config.resampler_n_latents
        return [num_tokens] * (sum(sizes) // num_tokens)


class PruneSIDIdefics2ForConditionalGeneration(
    PrunedGenerationMixin, Idefics2ForConditionalGeneration, GenerationMixin
):
    """[`Idefics2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDIdefics2Model


class PruneSIDIdefics2Processor(VariantProcessorMixin, Idefics2Processor):
    """
    [`Idefics2Processor`], which leaves no place to shorten what it writes: prompts are full, and the model shortens
    them. Also returns `num_tiles`; see [`TiledModelMixin`].
    """

    _auto_class = "AutoProcessor"

    def __call__(self, images=None, text=None, **kwargs):
        output = super().__call__(images=images, text=text, **kwargs)
        if "pixel_values" in output:
            texts, ids = [text] if isinstance(text, str) else text, output["input_ids"]
            tiles = 5 if self.image_processor.do_image_splitting else 1
            counts = [tiles] * sum(sample.count(self.image_token) for sample in texts)
            output["num_tiles"] = torch.tensor(counts) if isinstance(ids, torch.Tensor) else counts
        return output


PruneSIDIdefics2AutoModel = register_family(PruneSIDIdefics2ForConditionalGeneration, PruneSIDIdefics2Processor)
