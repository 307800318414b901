"""Mistral Large 4 with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    MistralLarge4Model,
    PixtralProcessor,
)

from .broken_rows import BrokenRowsModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import grids_of_image_sizes
from .processing import PrunedProcessorMixin


class PruneSIDMistralLarge4Config(BehindConnectorConfig, MistralLarge4Config):
    """[`MistralLarge4Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_mistral_large4"


class PruneSIDMistralLarge4Model(BrokenRowsModelMixin, MistralLarge4Model):
    """[`MistralLarge4Model`] with compressing `get_*_features`; see [`BrokenRowsModelMixin`]."""

    config_class = PruneSIDMistralLarge4Config
    patch_grids = grids_of_image_sizes


class PruneSIDMistralLarge4ForConditionalGeneration(
    PrunedGenerationMixin, MistralLarge4ForConditionalGeneration, GenerationMixin
):
    """[`MistralLarge4ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMistralLarge4Model


class PruneSIDMistralLarge4Processor(PrunedProcessorMixin, PixtralProcessor):
    """[`PixtralProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        return [sum(runs)]


PruneSIDMistralLarge4AutoModel = register_family(
    PruneSIDMistralLarge4ForConditionalGeneration, PruneSIDMistralLarge4Processor
)
