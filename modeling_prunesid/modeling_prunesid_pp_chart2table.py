"""PP-Chart2Table with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    GotOcr2ForConditionalGeneration,
    GotOcr2Model,
    PPChart2TableConfig,
    PPChart2TableProcessor,
)

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, register_family
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDPPChart2TableConfig(BehindConnectorConfig, PPChart2TableConfig):
    """[`PPChart2TableConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each page or tile."""

    model_type = "prunesid_pp_chart2table"
    _also_loads = ("got_ocr2",)


class PruneSIDPPChart2TableModel(TiledModelMixin, GotOcr2Model):
    """[`GotOcr2Model`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDPPChart2TableConfig
    pools_tensor = ("image",)

    def patches_per_token(self):
        return 16


class PruneSIDPPChart2TableForConditionalGeneration(
    PrunedGenerationMixin, GotOcr2ForConditionalGeneration, GenerationMixin
):
    """[`GotOcr2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDPPChart2TableModel


class PruneSIDPPChart2TableProcessor(TiledProcessorMixin, PPChart2TableProcessor):
    """[`PPChart2TableProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    def num_tiles(self, modality, inputs, index, runs):
        return sum(runs) // self.num_image_tokens


PruneSIDPPChart2TableAutoModel = register_family(
    PruneSIDPPChart2TableForConditionalGeneration, PruneSIDPPChart2TableProcessor
)
