"""Idefics3 with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    Idefics3Processor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDIdefics3Config(BehindConnectorConfig, Idefics3Config):
    """[`Idefics3Config`] with a nested [`PruneSIDConfig`], whose budget is that of each tile."""

    model_type = "prunesid_idefics3"


class PruneSIDIdefics3Model(TiledModelMixin, Idefics3Model):
    """[`Idefics3Model`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDIdefics3Config
    patch_grids = square_grids

    def tile_length(self, inputs):
        return self.image_seq_len


class PruneSIDIdefics3ForConditionalGeneration(
    PrunedGenerationMixin, Idefics3ForConditionalGeneration, GenerationMixin
):
    """[`Idefics3ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDIdefics3Model


class PruneSIDIdefics3Processor(TiledProcessorMixin, Idefics3Processor):
    """[`Idefics3Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDIdefics3AutoModel = register_family(PruneSIDIdefics3ForConditionalGeneration, PruneSIDIdefics3Processor)
