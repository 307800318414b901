"""dots3.note with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    Dots3NoteConfig,
    Dots3NoteForConditionalGeneration,
    Dots3NoteModel,
    Dots3NoteProcessor,
    GenerationMixin,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin


class PruneSIDDots3NoteConfig(GridConfigMixin, Dots3NoteConfig):
    """[`Dots3NoteConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_dots3_note"


class PruneSIDDots3NoteModel(GridModelMixin, Dots3NoteModel):
    """[`Dots3NoteModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDDots3NoteConfig


class PruneSIDDots3NoteForConditionalGeneration(
    PrunedGenerationMixin, Dots3NoteForConditionalGeneration, GenerationMixin
):
    """[`Dots3NoteForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDDots3NoteModel


class PruneSIDDots3NoteProcessor(GridProcessorMixin, Dots3NoteProcessor):
    """[`Dots3NoteProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDDots3NoteAutoModel = register_family(PruneSIDDots3NoteForConditionalGeneration, PruneSIDDots3NoteProcessor)
