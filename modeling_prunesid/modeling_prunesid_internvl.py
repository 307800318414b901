"""InternVL with PruneSID: tokens are compared as they enter the language model."""

from transformers import (
    GenerationMixin,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDInternVLConfig(BehindConnectorConfig, InternVLConfig):
    """
    [`InternVLConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each tile of 256 tokens, and of
    each frame of a video, which upstream encodes as an image.
    """

    model_type = "prunesid_internvl"


class PruneSIDInternVLModel(TiledModelMixin, InternVLModel):
    """[`InternVLModel`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDInternVLConfig
    views_apart = ("video",)
    pools_tensor = ("image",)
    patch_grids = square_grids

    def patches_per_token(self):
        return round(self.config.downsample_ratio**-2)


class PruneSIDInternVLForConditionalGeneration(
    PrunedGenerationMixin, InternVLForConditionalGeneration, GenerationMixin
):
    """[`InternVLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDInternVLModel


class PruneSIDInternVLProcessor(TiledProcessorMixin, InternVLProcessor):
    """[`InternVLProcessor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    _videos_are_images = True

    def num_tiles(self, modality, inputs, index, runs):
        return int(inputs["num_patches"][index]) if modality == "image" else len(runs)


PruneSIDInternVLAutoModel = register_family(PruneSIDInternVLForConditionalGeneration, PruneSIDInternVLProcessor)
