"""Granite Docling with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingModel,
    GraniteDoclingProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDGraniteDoclingConfig(BehindConnectorConfig, GraniteDoclingConfig):
    """[`GraniteDoclingConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile."""

    model_type = "prunesid_granite_docling"


class PruneSIDGraniteDoclingModel(TiledModelMixin, GraniteDoclingModel):
    """[`GraniteDoclingModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDGraniteDoclingConfig
    patch_grids = square_grids
    placeholder_mask_dims = 2

    def tile_length(self, inputs):
        return self.image_seq_len * (1 if inputs.get("tile_fine_mask") is None else 4)


class PruneSIDGraniteDoclingForConditionalGeneration(
    PrunedGenerationMixin, GraniteDoclingForConditionalGeneration, GenerationMixin
):
    """[`GraniteDoclingForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGraniteDoclingModel


class PruneSIDGraniteDoclingProcessor(TiledProcessorMixin, GraniteDoclingProcessor):
    """[`GraniteDoclingProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""


PruneSIDGraniteDoclingAutoModel = register_family(
    PruneSIDGraniteDoclingForConditionalGeneration, PruneSIDGraniteDoclingProcessor
)
