"""GOT-OCR 2.0 with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2Model,
    GotOcr2Processor,
)

from .family import PrunedGenerationMixin, register_family
from .got_ocr import GotOcrModelMixin
from .no_cls import BehindConnectorConfig
from .tiles import TiledProcessorMixin


class PruneSIDGotOcr2Config(BehindConnectorConfig, GotOcr2Config):
    """[`GotOcr2Config`] with a nested [`PruneSIDConfig`], whose budget is that of each page or tile."""

    model_type = "prunesid_got_ocr2"


class PruneSIDGotOcr2Model(GotOcrModelMixin, GotOcr2Model):
    """[`GotOcr2Model`] with compressing `get_*_features`; see [`GotOcrModelMixin`]."""

    config_class = PruneSIDGotOcr2Config


class PruneSIDGotOcr2ForConditionalGeneration(PrunedGenerationMixin, GotOcr2ForConditionalGeneration, GenerationMixin):
    """[`GotOcr2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGotOcr2Model


class PruneSIDGotOcr2Processor(TiledProcessorMixin, GotOcr2Processor):
    """[`GotOcr2Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    _joins_images = True

    def num_tiles(self, modality, inputs, index, runs):
        return sum(runs) // self.num_image_tokens


PruneSIDGotOcr2AutoModel = register_family(PruneSIDGotOcr2ForConditionalGeneration, PruneSIDGotOcr2Processor)
