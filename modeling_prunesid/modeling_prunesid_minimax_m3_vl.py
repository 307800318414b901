"""MiniMax-M3-VL with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLModel,
    MiniMaxM3VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDMiniMaxM3VLConfig(GridConfigMixin, MiniMaxM3VLConfig):
    """[`MiniMaxM3VLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_minimax_m3_vl"


class PruneSIDMiniMaxM3VLModel(GridModelMixin, MiniMaxM3VLModel):
    """[`MiniMaxM3VLModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDMiniMaxM3VLConfig


class PruneSIDMiniMaxM3VLForConditionalGeneration(
    PrunedGenerationMixin, MiniMaxM3SparseForConditionalGeneration, GenerationMixin
):
    """[`MiniMaxM3SparseForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniMaxM3VLModel


class PruneSIDMiniMaxM3VLProcessor(GridProcessorMixin, MiniMaxM3VLProcessor):
    """[`MiniMaxM3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDMiniMaxM3VLAutoModel = register_family(
    PruneSIDMiniMaxM3VLForConditionalGeneration, PruneSIDMiniMaxM3VLProcessor
)
