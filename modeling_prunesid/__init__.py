"""PruneSID for Transformers: the same model classes, a tenth of the visual tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_prunesid import PruneSIDConfig, PruneSIDLlavaConfig
from .modeling_prunesid_llava import (
    PruneSIDLlavaAutoModel,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaModel,
)
from .processing_prunesid import PruneSIDLlavaProcessor


AutoConfig.register(PruneSIDConfig.model_type, PruneSIDConfig)
for _config, _auto_model, _model, _processor in (
    (PruneSIDLlavaConfig, PruneSIDLlavaAutoModel, PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _auto_model)
    AutoModelForImageTextToText.register(_config, _model)
    AutoModelForMultimodalLM.register(_config, _model)
    AutoProcessor.register(_config, _processor)

__all__ = [
    "PruneSIDConfig",
    "PruneSIDLlavaConfig",
    "PruneSIDLlavaForConditionalGeneration",
    "PruneSIDLlavaModel",
    "PruneSIDLlavaProcessor",
]
