"""Ovis2 with PruneSID: tokens are compared as they enter the language model."""

from transformers import GenerationMixin, Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Model, Ovis2Processor

from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .patches import square_grids
from .tiles import TiledModelMixin, TiledProcessorMixin


class PruneSIDOvis2Config(BehindConnectorConfig, Ovis2Config):
    """[`Ovis2Config`] with a nested [`PruneSIDConfig`], whose budget is that of each tile."""

    model_type = "prunesid_ovis2"


class PruneSIDOvis2Model(TiledModelMixin, Ovis2Model):
    """[`Ovis2Model`] with compressing `get_*_features`; see [`TiledModelMixin`]."""

    config_class = PruneSIDOvis2Config
    pools_tensor = ("image",)
    patch_grids = square_grids

    def patches_per_token(self):
        return self.config.vision_config.hidden_stride**2


class PruneSIDOvis2ForConditionalGeneration(PrunedGenerationMixin, Ovis2ForConditionalGeneration, GenerationMixin):
    """[`Ovis2ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDOvis2Model


class PruneSIDOvis2Processor(TiledProcessorMixin, Ovis2Processor):
    """[`Ovis2Processor`] that writes short prompts; see [`TiledProcessorMixin`]."""

    def _placeholder(self, modality):
        return "<IMG_ATOM>"


PruneSIDOvis2AutoModel = register_family(PruneSIDOvis2ForConditionalGeneration, PruneSIDOvis2Processor)
