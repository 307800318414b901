"""Muse Glimmer with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    MuseGlimmerModel,
    MuseGlimmerProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDMuseGlimmerConfig(GridConfigMixin, MuseGlimmerConfig):
    """[`MuseGlimmerConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_muse_glimmer"


class PruneSIDMuseGlimmerModel(GridModelMixin, MuseGlimmerModel):
    """[`MuseGlimmerModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDMuseGlimmerConfig
    has_raster_patches = True


class PruneSIDMuseGlimmerForConditionalGeneration(
    PrunedGenerationMixin, MuseGlimmerForConditionalGeneration, GenerationMixin
):
    """[`MuseGlimmerForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMuseGlimmerModel


class PruneSIDMuseGlimmerProcessor(GridProcessorMixin, MuseGlimmerProcessor):
    """[`MuseGlimmerProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDMuseGlimmerAutoModel = register_family(
    PruneSIDMuseGlimmerForConditionalGeneration, PruneSIDMuseGlimmerProcessor
)
