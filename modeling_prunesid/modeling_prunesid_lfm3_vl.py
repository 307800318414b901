"""LFM3-VL with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    Lfm3VlModel,
    Lfm3VlProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDLfm3VlConfig(GridConfigMixin, Lfm3VlConfig):
    """[`Lfm3VlConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_lfm3_vl"


class PruneSIDLfm3VlModel(GridModelMixin, Lfm3VlModel):
    """[`Lfm3VlModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDLfm3VlConfig


class PruneSIDLfm3VlForConditionalGeneration(PrunedGenerationMixin, Lfm3VlForConditionalGeneration, GenerationMixin):
    """[`Lfm3VlForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLfm3VlModel


class PruneSIDLfm3VlProcessor(GridProcessorMixin, Lfm3VlProcessor):
    """[`Lfm3VlProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDLfm3VlAutoModel = register_family(PruneSIDLfm3VlForConditionalGeneration, PruneSIDLfm3VlProcessor)
