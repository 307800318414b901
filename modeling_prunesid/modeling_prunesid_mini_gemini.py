"""Mini-Gemini with PruneSID: tokens are compared as they enter the projector, and only the kept ones are projected."""

from transformers import GenerationMixin

from .configuration_mini_gemini import MiniGeminiConfig
from .encoding import TowerModelMixin
from .family import PrunedGenerationMixin, register_family
from .modeling_mini_gemini import MiniGeminiForConditionalGeneration, MiniGeminiModel
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin
from .processing_mini_gemini import MiniGeminiProcessor


class PruneSIDMiniGeminiConfig(BehindConnectorConfig, MiniGeminiConfig):
    """
    [`MiniGeminiConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image, with all of its tiles in
    Mini-Gemini-HD. `layer` has no meaning here: the final image tokens are compared.
    """

    model_type = "prunesid_mini_gemini"
    _has_no_cls = "it compares the final image tokens, among which is no CLS token"


class PruneSIDMiniGeminiModel(TowerModelMixin, MiniGeminiModel):
    """[`MiniGeminiModel`] with a compressing `get_image_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDMiniGeminiConfig
    projector_name = "multi_modal_projector"

    def tokens_of_an_image(self) -> int:
        return self.config.num_image_tokens

    def views(self, modality, inputs, sizes):
        [[num_patches], *_] = super().views(modality, {"pixel_values": inputs["pixel_values"].flatten(0, -4)}, None)
        return [[num_patches * self.config.views_per_image]] * len(inputs["pixel_values"])


class PruneSIDMiniGeminiForConditionalGeneration(
    PrunedGenerationMixin, MiniGeminiForConditionalGeneration, GenerationMixin
):
    """[`MiniGeminiForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniGeminiModel


class PruneSIDMiniGeminiProcessor(PrunedProcessorMixin, MiniGeminiProcessor):
    """[`MiniGeminiProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDMiniGeminiAutoModel = register_family(PruneSIDMiniGeminiForConditionalGeneration, PruneSIDMiniGeminiProcessor)
