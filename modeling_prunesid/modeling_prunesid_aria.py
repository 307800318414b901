"""Aria with PruneSID: tokens are compared as they enter the language model."""

import math

from transformers import AriaConfig, AriaForConditionalGeneration, AriaModel, AriaProcessor, GenerationMixin

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDAriaConfig(BehindConnectorConfig, AriaConfig):
    """[`AriaConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop, of 128 or 256 queries."""

    model_type = "prunesid_aria"


class PruneSIDAriaModel(TiledModelMixin, AriaModel):
    """[`AriaModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDAriaConfig
    views_apart = ()
    pools_tensor = ("image",)

    def sizes_of(self, modality, inputs):
        patch = self.config.vision_config.patch_size
        patches = [side // patch for side in inputs["pixel_values"].shape[-2:]]
        return [self.config.projector_patch_to_query_dict[math.prod(patches)]] * len(inputs["pixel_values"])


class PruneSIDAriaForConditionalGeneration(PrunedGenerationMixin, AriaForConditionalGeneration, GenerationMixin):
    """[`AriaForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDAriaModel


class PruneSIDAriaProcessor(TiledProcessorMixin, AriaProcessor):
    """[`AriaProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    def num_tiles(self, modality, inputs, index, runs):
        return int(inputs["num_crops"])


PruneSIDAriaAutoModel = register_family(PruneSIDAriaForConditionalGeneration, PruneSIDAriaProcessor)
