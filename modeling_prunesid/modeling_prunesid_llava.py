"""LLaVA-1.5 with PruneSID: tokens are compared in the tower, and only the kept ones are projected."""

from transformers import GenerationMixin, LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor

from .configuration_prunesid import NestsPruneSIDConfig
from .encoding import TowerModelMixin
from .family import PrunedGenerationMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDLlavaConfig(NestsPruneSIDConfig, LlavaConfig):
    """[`LlavaConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_llava"


class PruneSIDLlavaModel(TowerModelMixin, LlavaModel):
    """[`LlavaModel`] with a compressing `get_image_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDLlavaConfig
    towers = {"image": "vision_tower"}
    projector_name = "multi_modal_projector"

    def tokens_of_an_image(self) -> int:
        vision = self.config.vision_config
        is_full = self.config.vision_feature_select_strategy == "full"
        return (vision.image_size // vision.patch_size) ** 2 + is_full

    def views(self, modality, inputs, sizes):
        if inputs.get("image_sizes") is not None:
            raise ValueError(
                f"image_sizes={inputs['image_sizes']!r} are for towers without a fixed grid (Pixtral), which PruneSID "
                "for LLaVA does not compress. Set prunesid_config.budget=None for them."
            )
        return super().views(modality, inputs, sizes)


class PruneSIDLlavaForConditionalGeneration(PrunedGenerationMixin, LlavaForConditionalGeneration, GenerationMixin):
    """[`LlavaForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDLlavaModel


class PruneSIDLlavaProcessor(PrunedProcessorMixin, LlavaProcessor):
    """[`LlavaProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDLlavaAutoModel = register_family(PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor)
