"""Gemma 3 with PruneSID: tokens are compared as they enter the language model."""

from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Model, Gemma3Processor, GenerationMixin

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDGemma3Config(BehindConnectorConfig, Gemma3Config):
    """
    [`Gemma3Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image, and of each of its crops
    (pan and scan).
    """

    model_type = "prunesid_gemma3"
    is_mm_prefix_lm = True  # placeholders see each other, which vLLM knows by the stock model type


class PruneSIDGemma3Model(TiledModelMixin, Gemma3Model):
    """[`Gemma3Model`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDGemma3Config
    pools_tensor = ("image",)
    patch_grids = square_grids

    def patches_per_token(self):
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.mm_tokens_per_image


class PruneSIDGemma3ForConditionalGeneration(PrunedGenerationMixin, Gemma3ForConditionalGeneration, GenerationMixin):
    """[`Gemma3ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGemma3Model


class PruneSIDGemma3Processor(TiledProcessorMixin, Gemma3Processor):
    """[`Gemma3Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    def _placeholder(self, modality):
        return self.tokenizer.image_token


PruneSIDGemma3AutoModel = register_family(PruneSIDGemma3ForConditionalGeneration, PruneSIDGemma3Processor)
