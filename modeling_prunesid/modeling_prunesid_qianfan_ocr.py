"""Qianfan-OCR with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRModel,
    QianfanOCRProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDQianfanOCRConfig(BehindConnectorConfig, QianfanOCRConfig):
    """[`QianfanOCRConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile."""

    model_type = "prunesid_qianfan_ocr"


class PruneSIDQianfanOCRModel(TiledModelMixin, QianfanOCRModel):
    """[`QianfanOCRModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDQianfanOCRConfig
    views_apart = ()
    pools_tensor = ("image",)
    patch_grids = square_grids

    def patches_per_token(self):
        return round(self.config.downsample_ratio**-2)


class PruneSIDQianfanOCRForConditionalGeneration(
    PrunedGenerationMixin, QianfanOCRForConditionalGeneration, GenerationMixin
):
    """[`QianfanOCRForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDQianfanOCRModel


class PruneSIDQianfanOCRProcessor(TiledProcessorMixin, QianfanOCRProcessor):
    """[`QianfanOCRProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    def num_tiles(self, modality, inputs, index, runs):
        return int(inputs["num_patches"][index])


PruneSIDQianfanOCRAutoModel = register_family(PruneSIDQianfanOCRForConditionalGeneration, PruneSIDQianfanOCRProcessor)
