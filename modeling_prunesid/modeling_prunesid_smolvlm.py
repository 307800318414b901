"""SmolVLM with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
    SmolVLMProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDSmolVLMConfig(BehindConnectorConfig, SmolVLMConfig):
    """
    [`SmolVLMConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile, and of each frame of a
    video, which upstream encodes as an image.
    """

    model_type = "prunesid_smolvlm"


class PruneSIDSmolVLMModel(TiledModelMixin, SmolVLMModel):
    """[`SmolVLMModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDSmolVLMConfig
    patch_grids = square_grids

    def tile_length(self, inputs):
        return self.image_seq_len


class PruneSIDSmolVLMForConditionalGeneration(PrunedGenerationMixin, SmolVLMForConditionalGeneration, GenerationMixin):
    """[`SmolVLMForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDSmolVLMModel


class CountingSmolVLMProcessor(SmolVLMProcessor):
    """[`SmolVLMProcessor`], which writes images as Idefics3 does and does not say how many tokens they get."""

    _get_num_multimodal_tokens = Idefics3Processor._get_num_multimodal_tokens


class PruneSIDSmolVLMProcessor(TiledProcessorMixin, CountingSmolVLMProcessor):
    """[`SmolVLMProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    _videos_are_images = True


PruneSIDSmolVLMAutoModel = register_family(PruneSIDSmolVLMForConditionalGeneration, PruneSIDSmolVLMProcessor)
