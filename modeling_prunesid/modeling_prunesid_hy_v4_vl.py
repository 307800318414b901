"""HY-V4-VL with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    HYV4VLConfig,
    HYV4VLForConditionalGeneration,
    HYV4VLModel,
    HYV4VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin
from .mrope import MRoPEModelMixin
from .newlines import NewlineGridModelMixin, NewlineGridProcessorMixin


class PruneSIDHYV4VLConfig(GridConfigMixin, HYV4VLConfig):
    """[`HYV4VLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_hy_v4_vl"


class PruneSIDHYV4VLModel(MRoPEModelMixin, NewlineGridModelMixin, HYV4VLModel):
    """[`HYV4VLModel`] with compressing `get_*_features`; see [`NewlineGridModelMixin`]."""

    config_class = PruneSIDHYV4VLConfig


class PruneSIDHYV4VLForConditionalGeneration(PrunedGenerationMixin, HYV4VLForConditionalGeneration, GenerationMixin):
    """[`HYV4VLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDHYV4VLModel


class PruneSIDHYV4VLProcessor(NewlineGridProcessorMixin, HYV4VLProcessor):
    """[`HYV4VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDHYV4VLAutoModel = register_family(PruneSIDHYV4VLForConditionalGeneration, PruneSIDHYV4VLProcessor)
