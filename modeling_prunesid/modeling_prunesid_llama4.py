"""Llama 4 with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import GenerationMixin, Llama4Config, Llama4ForConditionalGeneration, Llama4Processor

from .family import register_family
from .image_outputs import add_image_outputs
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin
from .whole import PrunedWholeMixin


class PruneSIDLlama4Config(BehindConnectorConfig, Llama4Config):
    """[`Llama4Config`] with a nested [`PruneSIDConfig`], whose budget is that of each tile."""

    model_type = "prunesid_llama4"


class PruneSIDLlama4ForConditionalGeneration(
    TiledModelMixin, PrunedWholeMixin, Llama4ForConditionalGeneration, GenerationMixin
):
    """[`Llama4ForConditionalGeneration`] on shortened prompts; see [`PrunedWholeMixin`]."""

    config_class = PruneSIDLlama4Config
    patch_grids = square_grids
    not_in_tuples = ("image_outputs",)

    def patches_per_token(self):
        return round(self.config.vision_config.pixel_shuffle_ratio**-2)

    def __init__(self, config):
        super().__init__(config)
        add_image_outputs(self.language_model)

    def _forward_stock(self, **inputs):
        add_image_outputs(self.language_model)  # of a stock model, by `compress`
        return super()._forward_stock(**inputs)

    def patches_of(self, attention):
        return attention[:, :-1]  # its CLS token is the last

    def features_of(self, output):
        return list(output.last_hidden_state)

    def put_features(self, output, keep):
        output.last_hidden_state = torch.cat(keep(output.last_hidden_state))[None]


class PruneSIDLlama4Processor(TiledProcessorMixin, Llama4Processor):
    """[`Llama4Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    def _placeholder(self, modality):
        return self.img_patch_token


PruneSIDLlama4AutoModel = register_family(PruneSIDLlama4ForConditionalGeneration, PruneSIDLlama4Processor)
