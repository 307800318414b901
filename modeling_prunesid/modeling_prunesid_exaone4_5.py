"""EXAONE 4.5 with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Exaone4_5_Model,
    Exaone4_5_Processor,
    GenerationMixin,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDExaone4_5_Config(GridConfigMixin, Exaone4_5_Config):
    """[`Exaone4_5_Config`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_exaone4_5"


class PruneSIDExaone4_5_Model(GridModelMixin, Exaone4_5_Model):
    """[`Exaone4_5_Model`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDExaone4_5_Config


class PruneSIDExaone4_5_ForConditionalGeneration(
    PrunedGenerationMixin, Exaone4_5_ForConditionalGeneration, GenerationMixin
):
    """[`Exaone4_5_ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDExaone4_5_Model


class PruneSIDExaone4_5_Processor(GridProcessorMixin, Exaone4_5_Processor):
    """[`Exaone4_5_Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDExaone4_5_AutoModel = register_family(PruneSIDExaone4_5_ForConditionalGeneration, PruneSIDExaone4_5_Processor)
