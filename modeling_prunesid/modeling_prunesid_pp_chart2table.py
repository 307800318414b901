"""PP-Chart2Table with PruneSID: tokens are compared as they enter the language model."""

import re

from transformers import (
    GenerationMixin,
    GotOcr2ForConditionalGeneration,
    GotOcr2Model,
    PPChart2TableConfig,
    PPChart2TableProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .got_ocr import GotOcrModelMixin
from .no_cls import BehindConnectorConfig
from .tiles import TiledProcessorMixin


class PruneSIDPPChart2TableConfig(BehindConnectorConfig, PPChart2TableConfig):
    """[`PPChart2TableConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each page or tile."""

    model_type = "prunesid_pp_chart2table"
    _also_loads = ("got_ocr2",)


class PruneSIDPPChart2TableModel(GotOcrModelMixin, GotOcr2Model):
    """[`GotOcr2Model`] with compressing `get_*_features`; see [`GotOcrModelMixin`]."""

    config_class = PruneSIDPPChart2TableConfig


class PruneSIDPPChart2TableForConditionalGeneration(
    PrunedGenerationMixin, GotOcr2ForConditionalGeneration, GenerationMixin
):
    """[`GotOcr2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDPPChart2TableModel


class PruneSIDPPChart2TableProcessor(TiledProcessorMixin, PPChart2TableProcessor):
    """
    [`PPChart2TableProcessor`] that writes short prompts; see [`TiledProcessorMixin`]. Upstream's writes no
    placeholders: its chat template does, a run for each image. Here a run may have any length.
    """

    image_token, num_image_tokens = "<imgpad>", 256  # as in GOT-OCR 2.0
    _joins_images = True

    def __call__(self, images=None, text=None, **kwargs):
        pattern = f"(?:{re.escape(self.image_token)})+"
        texts = [re.sub(pattern, self.image_token, own) for own in ([text] if isinstance(text, str) else text or [])]
        return super().__call__(images=images, text=texts or None, **kwargs)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * self.num_image_tokens


PruneSIDPPChart2TableAutoModel = register_family(
    PruneSIDPPChart2TableForConditionalGeneration, PruneSIDPPChart2TableProcessor
)
