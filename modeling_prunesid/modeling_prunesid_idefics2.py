"""Idefics2 with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Model,
    Idefics2Processor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .own_call import SameTextProcessorMixin
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


class PruneSIDIdefics2Processor(SameTextProcessorMixin, Idefics2Processor):
    """[`Idefics2Processor`] that writes short prompts; see [`SameTextProcessorMixin`]."""

    def tiles_of_an_image(self):
        return [self.image_seq_len] * (5 if self.image_processor.do_image_splitting else 1)


PruneSIDIdefics2AutoModel = register_family(PruneSIDIdefics2ForConditionalGeneration, PruneSIDIdefics2Processor)
