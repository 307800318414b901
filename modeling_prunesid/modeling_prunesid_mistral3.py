"""Mistral Small 3.1 with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PixtralProcessor,
)

from .broken_rows import BrokenRowsModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import grids_of_image_sizes
from .processing import PrunedProcessorMixin


class PruneSIDMistral3Config(BehindConnectorConfig, Mistral3Config):
    """[`Mistral3Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_mistral3"


class PruneSIDMistral3Model(BrokenRowsModelMixin, Mistral3Model):
    """[`Mistral3Model`] with compressing `get_*_features`; see [`BrokenRowsModelMixin`]."""

    config_class = PruneSIDMistral3Config
    patch_grids = grids_of_image_sizes


class PruneSIDMistral3ForConditionalGeneration(
    PrunedGenerationMixin, Mistral3ForConditionalGeneration, GenerationMixin
):
    """[`Mistral3ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMistral3Model


class PruneSIDMistral3Processor(PrunedProcessorMixin, PixtralProcessor):
    """[`PixtralProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        return [sum(runs)]


PruneSIDMistral3AutoModel = register_family(PruneSIDMistral3ForConditionalGeneration, PruneSIDMistral3Processor)
