"""PaddleOCR-VL with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLModel,
    PaddleOCRVLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDPaddleOCRVLConfig(GridConfigMixin, PaddleOCRVLConfig):
    """[`PaddleOCRVLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_paddleocr_vl"


class PruneSIDPaddleOCRVLModel(MRoPEModelMixin, GridModelMixin, PaddleOCRVLModel):
    """[`PaddleOCRVLModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDPaddleOCRVLConfig
    has_raster_patches = True


class PruneSIDPaddleOCRVLForConditionalGeneration(
    PrunedGenerationMixin, PaddleOCRVLForConditionalGeneration, GenerationMixin
):
    """[`PaddleOCRVLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDPaddleOCRVLModel


class PruneSIDPaddleOCRVLProcessor(GridProcessorMixin, PaddleOCRVLProcessor):
    """[`PaddleOCRVLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDPaddleOCRVLAutoModel = register_family(
    PruneSIDPaddleOCRVLForConditionalGeneration, PruneSIDPaddleOCRVLProcessor
)
