"""LLaVA-OneVision with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)

from .anyres import PackedModelMixin, PackedProcessorMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig


class PruneSIDLlavaOnevisionConfig(BehindConnectorConfig, LlavaOnevisionConfig):
    """[`LlavaOnevisionConfig`] with a nested [`PruneSIDConfig`]: the budget of each crop and of each frame."""

    model_type = "prunesid_llava_onevision"


class PruneSIDLlavaOnevisionModel(PackedModelMixin, LlavaOnevisionModel):
    """[`LlavaOnevisionModel`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLlavaOnevisionConfig
    pools_tensor, num_separators = ("video",), 1

    def tokens_of_frame(self, inputs):
        return ((self.crop_side + 1) // 2) ** 2

    def layout(self, inputs):
        return {"vision_aspect_ratio": inputs.get("vision_aspect_ratio") or self.config.vision_aspect_ratio}

    def pool_attention(self, patches, modality, inputs, num_tokens):
        if modality == "image":
            return super().pool_attention(patches, modality, inputs, num_tokens)
        return self.apply_pooling(patches.view(-1, self.crop_side**2, 1)).flatten()


class PruneSIDLlavaOnevisionForConditionalGeneration(
    PrunedGenerationMixin, LlavaOnevisionForConditionalGeneration, GenerationMixin
):
    """[`LlavaOnevisionForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaOnevisionModel


class PruneSIDLlavaOnevisionProcessor(PackedProcessorMixin, LlavaOnevisionProcessor):
    """[`LlavaOnevisionProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    num_separators = 1
    pack_image_features = LlavaOnevisionModel.pack_image_features

    def layout(self):
        return {"vision_aspect_ratio": self.vision_aspect_ratio}


PruneSIDLlavaOnevisionAutoModel = register_family(
    PruneSIDLlavaOnevisionForConditionalGeneration, PruneSIDLlavaOnevisionProcessor
)
