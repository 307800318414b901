"""HyperCLOVA X Vision with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    HyperCLOVAXVisionV2Model,
    HyperCLOVAXVisionV2Processor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDHyperCLOVAXVisionV2Config(GridConfigMixin, HyperCLOVAXVisionV2Config):
    """[`HyperCLOVAXVisionV2Config`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_hyperclovax_vision_v2"


class PruneSIDHyperCLOVAXVisionV2Model(GridModelMixin, HyperCLOVAXVisionV2Model):
    """[`HyperCLOVAXVisionV2Model`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDHyperCLOVAXVisionV2Config


class PruneSIDHyperCLOVAXVisionV2ForConditionalGeneration(
    PrunedGenerationMixin, HyperCLOVAXVisionV2ForConditionalGeneration, GenerationMixin
):
    """[`HyperCLOVAXVisionV2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDHyperCLOVAXVisionV2Model


class PruneSIDHyperCLOVAXVisionV2Processor(GridProcessorMixin, HyperCLOVAXVisionV2Processor):
    """[`HyperCLOVAXVisionV2Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDHyperCLOVAXVisionV2AutoModel = register_family(
    PruneSIDHyperCLOVAXVisionV2ForConditionalGeneration, PruneSIDHyperCLOVAXVisionV2Processor
)
