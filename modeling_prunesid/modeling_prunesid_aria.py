"""Aria with PruneSID: tokens are compared as they enter the language model."""

from transformers import AriaConfig, AriaForConditionalGeneration, AriaModel, AriaProcessor, GenerationMixin

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, register_family
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDAriaConfig(BehindConnectorConfig, AriaConfig):
    """[`AriaConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop, of 128 or 256 queries."""

    model_type = "prunesid_aria"


class PruneSIDAriaModel(TiledModelMixin, AriaModel):
    """[`AriaModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDAriaConfig
    views_apart = ()
    pools_tensor = ("image",)


class PruneSIDAriaForConditionalGeneration(PrunedGenerationMixin, AriaForConditionalGeneration, GenerationMixin):
    """[`AriaForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDAriaModel


class PruneSIDAriaProcessor(TiledProcessorMixin, AriaProcessor):
    """[`AriaProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    def num_tiles(self, modality, inputs, index, runs):
        return int(inputs["num_crops"])


PruneSIDAriaAutoModel = register_family(PruneSIDAriaForConditionalGeneration, PruneSIDAriaProcessor)
