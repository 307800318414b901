"""Cosmos3-Edge with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3EdgeModel,
    Cosmos3EdgeProcessor,
    GenerationMixin,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .mrope import MRoPEModelMixin


class PruneSIDCosmos3EdgeConfig(GridConfigMixin, Cosmos3EdgeConfig):
    """[`Cosmos3EdgeConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_cosmos3_edge"


class PruneSIDCosmos3EdgeModel(MRoPEModelMixin, GridModelMixin, Cosmos3EdgeModel):
    """[`Cosmos3EdgeModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDCosmos3EdgeConfig


class PruneSIDCosmos3EdgeForConditionalGeneration(
    PrunedGenerationMixin, Cosmos3EdgeForConditionalGeneration, GenerationMixin
):
    """[`Cosmos3EdgeForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDCosmos3EdgeModel


class PruneSIDCosmos3EdgeProcessor(GridProcessorMixin, Cosmos3EdgeProcessor):
    """[`Cosmos3EdgeProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def __call__(self, *args, **kwargs):
        kwargs.setdefault(
            "return_mm_token_type_ids", True
        )  # upstream's model needs them, its processor has no default
        return super().__call__(*args, **kwargs)


PruneSIDCosmos3EdgeAutoModel = register_family(
    PruneSIDCosmos3EdgeForConditionalGeneration, PruneSIDCosmos3EdgeProcessor
)
