"""PruneSID for Transformers: the same model classes, a tenth of the visual tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_prunesid import PruneSIDConfig, PruneSIDLlavaConfig
from .modeling_prunesid_llava import (
    PruneSIDLlavaAutoModel,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaModel,
)


AutoConfig.register(PruneSIDConfig.model_type, PruneSIDConfig)
for _config, _auto_model, _model in (
    (PruneSIDLlavaConfig, PruneSIDLlavaAutoModel, PruneSIDLlavaForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _auto_model)
    AutoModelForImageTextToText.register(_config, _model)
    AutoModelForMultimodalLM.register(_config, _model)

__all__ = [
    "PruneSIDConfig",
    "PruneSIDLlavaConfig",
    "PruneSIDLlavaForConditionalGeneration",
    "PruneSIDLlavaModel",
]
