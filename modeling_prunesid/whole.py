"""Stock models with tower, projector and language-modelling head in one class."""

from .family import PrunedModelMixin
from .generation import CompressedGenerationMixin


class PrunedWholeMixin(PrunedModelMixin, CompressedGenerationMixin):
    """For a stock model with tower, projector and language-modelling head in one class. See [`PrunedModelMixin`]."""

    _auto_class = "AutoModelForImageTextToText"

    @property
    def model(self):
        return self
