"""Stock models with tower, projector and language-modelling head in one class."""

from .family import PrunedModelMixin
from .generation import CompressedGenerationMixin


class PrunedWholeMixin(PrunedModelMixin, CompressedGenerationMixin):
    """For a stock model with tower, projector and language-modelling head in one class. See [`PrunedModelMixin`]."""

    _auto_class = "AutoModelForImageTextToText"

    @property
    def model(self):
        return self

    def _forward_stock(self, mm_encoder_outputs=None, **inputs):
        output = super()._forward_stock(mm_encoder_outputs=mm_encoder_outputs, **inputs)
        for name in self.not_in_tuples:  # upstream's `forward` does not hand on what encoders returned
            if name in getattr(output, "__dataclass_fields__", ()):
                setattr(output, name, (mm_encoder_outputs or {}).get(name.removesuffix("_outputs")))
        return output
