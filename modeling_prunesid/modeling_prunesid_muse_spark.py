"""Muse Spark with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    MuseSparkConfig,
    MuseSparkForConditionalGeneration,
    MuseSparkModel,
    MuseSparkProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDMuseSparkConfig(GridConfigMixin, MuseSparkConfig):
    """[`MuseSparkConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_muse_spark"


class PruneSIDMuseSparkModel(GridModelMixin, MuseSparkModel):
    """[`MuseSparkModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDMuseSparkConfig
    has_raster_patches = True


class PruneSIDMuseSparkForConditionalGeneration(
    PrunedGenerationMixin, MuseSparkForConditionalGeneration, GenerationMixin
):
    """[`MuseSparkForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMuseSparkModel


class PruneSIDMuseSparkProcessor(GridProcessorMixin, MuseSparkProcessor):
    """[`MuseSparkProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDMuseSparkAutoModel = register_family(PruneSIDMuseSparkForConditionalGeneration, PruneSIDMuseSparkProcessor)
