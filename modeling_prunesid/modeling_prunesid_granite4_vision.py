"""Granite 4 Vision with PruneSID: tokens are compared as they enter the language model."""

import fractions

from transformers import (
    GenerationMixin,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionModel,
    Granite4VisionProcessor,
)

from .anyres import PackedModelMixin, PackedProcessorMixin
from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig


class PruneSIDGranite4VisionConfig(BehindConnectorConfig, Granite4VisionConfig):
    """[`Granite4VisionConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each crop."""

    model_type = "prunesid_granite4_vision"


class PruneSIDGranite4VisionModel(PackedModelMixin, Granite4VisionModel):
    """[`Granite4VisionModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDGranite4VisionConfig
    pool_attention = BehindConnectorModelMixin.pool_attention  # tokens are merged by attention, not from patches

    def features_of(self, output):
        return list(output.deepstack_features[0][1])

    def put_features(self, output, keep):
        output.deepstack_features = [(layer, keep(features)) for layer, features in output.deepstack_features]

    def layout(self, inputs):
        vision = self.config.vision_config
        side = int(vision.image_size // vision.patch_size * fractions.Fraction(self.downsample_rate))
        return {**super().layout(inputs), "side": side}


class PruneSIDGranite4VisionForConditionalGeneration(
    PrunedGenerationMixin, Granite4VisionForConditionalGeneration, GenerationMixin
):
    """[`Granite4VisionForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGranite4VisionModel


class PruneSIDGranite4VisionProcessor(PackedProcessorMixin, Granite4VisionProcessor):
    """[`Granite4VisionProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def side_of(self, crop_size):
        return int(super().side_of(crop_size) * fractions.Fraction(self.downsample_rate or 1))


PruneSIDGranite4VisionAutoModel = register_family(
    PruneSIDGranite4VisionForConditionalGeneration, PruneSIDGranite4VisionProcessor
)
