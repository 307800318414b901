"""PruneSID for Transformers: the same model classes, a tenth of the visual tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_mini_gemini import MiniGeminiConfig
from .configuration_prunesid import (
    PruneSIDConfig,
    PruneSIDLlavaConfig,
    PruneSIDLlavaNextConfig,
    PruneSIDQwen2_5_VLConfig,
    PruneSIDQwen2VLConfig,
    PruneSIDQwen3VLConfig,
    PruneSIDVideoLlavaConfig,
)
from .configuration_prunesid_mini_gemini import PruneSIDMiniGeminiConfig
from .configuration_vitcop import ViTCoPConfig, ViTCoPLlavaConfig
from .modeling_mini_gemini import MiniGeminiForConditionalGeneration, MiniGeminiModel
from .modeling_prunesid_llava import (
    PruneSIDLlavaAutoModel,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaModel,
)
from .modeling_prunesid_llava_next import (
    PruneSIDLlavaNextAutoModel,
    PruneSIDLlavaNextForConditionalGeneration,
    PruneSIDLlavaNextModel,
)
from .modeling_prunesid_mini_gemini import (
    PruneSIDMiniGeminiAutoModel,
    PruneSIDMiniGeminiForConditionalGeneration,
    PruneSIDMiniGeminiModel,
)
from .modeling_prunesid_qwen2_5_vl import (
    PruneSIDQwen2_5_VLAutoModel,
    PruneSIDQwen2_5_VLForConditionalGeneration,
    PruneSIDQwen2_5_VLModel,
)
from .modeling_prunesid_qwen2_vl import (
    PruneSIDQwen2VLAutoModel,
    PruneSIDQwen2VLForConditionalGeneration,
    PruneSIDQwen2VLModel,
)
from .modeling_prunesid_qwen3_vl import (
    PruneSIDQwen3VLAutoModel,
    PruneSIDQwen3VLForConditionalGeneration,
    PruneSIDQwen3VLModel,
)
from .modeling_prunesid_video_llava import (
    PruneSIDVideoLlavaAutoModel,
    PruneSIDVideoLlavaForConditionalGeneration,
    PruneSIDVideoLlavaModel,
)
from .modeling_vitcop_llava import (
    ViTCoPLlavaAutoModel,
    ViTCoPLlavaForConditionalGeneration,
    ViTCoPLlavaModel,
)
from .processing_mini_gemini import MiniGeminiProcessor
from .processing_prunesid import PruneSIDLlavaProcessor
from .processing_prunesid_llava_next import PruneSIDLlavaNextProcessor
from .processing_prunesid_mini_gemini import PruneSIDMiniGeminiProcessor
from .processing_prunesid_qwen_vl import (
    PruneSIDQwen2_5_VLProcessor,
    PruneSIDQwen2VLProcessor,
    PruneSIDQwen3VLProcessor,
)
from .processing_prunesid_video_llava import PruneSIDVideoLlavaProcessor
from .processing_vitcop_llava import ViTCoPLlavaProcessor


AutoConfig.register(PruneSIDConfig.model_type, PruneSIDConfig)
AutoConfig.register(ViTCoPConfig.model_type, ViTCoPConfig)
for _config, _auto_model, _model, _processor in (
    (PruneSIDLlavaConfig, PruneSIDLlavaAutoModel, PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor),
    (
        PruneSIDLlavaNextConfig,
        PruneSIDLlavaNextAutoModel,
        PruneSIDLlavaNextForConditionalGeneration,
        PruneSIDLlavaNextProcessor,
    ),
    (
        PruneSIDQwen2VLConfig,
        PruneSIDQwen2VLAutoModel,
        PruneSIDQwen2VLForConditionalGeneration,
        PruneSIDQwen2VLProcessor,
    ),
    (
        PruneSIDQwen2_5_VLConfig,
        PruneSIDQwen2_5_VLAutoModel,
        PruneSIDQwen2_5_VLForConditionalGeneration,
        PruneSIDQwen2_5_VLProcessor,
    ),
    (
        PruneSIDQwen3VLConfig,
        PruneSIDQwen3VLAutoModel,
        PruneSIDQwen3VLForConditionalGeneration,
        PruneSIDQwen3VLProcessor,
    ),
    (
        PruneSIDVideoLlavaConfig,
        PruneSIDVideoLlavaAutoModel,
        PruneSIDVideoLlavaForConditionalGeneration,
        PruneSIDVideoLlavaProcessor,
    ),
    (ViTCoPLlavaConfig, ViTCoPLlavaAutoModel, ViTCoPLlavaForConditionalGeneration, ViTCoPLlavaProcessor),
    (MiniGeminiConfig, MiniGeminiModel, MiniGeminiForConditionalGeneration, MiniGeminiProcessor),
    (
        PruneSIDMiniGeminiConfig,
        PruneSIDMiniGeminiAutoModel,
        PruneSIDMiniGeminiForConditionalGeneration,
        PruneSIDMiniGeminiProcessor,
    ),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _auto_model)
    AutoModelForImageTextToText.register(_config, _model)
    AutoModelForMultimodalLM.register(_config, _model)
    AutoProcessor.register(_config, _processor)

__all__ = [
    "MiniGeminiConfig",
    "MiniGeminiForConditionalGeneration",
    "MiniGeminiModel",
    "MiniGeminiProcessor",
    "PruneSIDConfig",
    "PruneSIDLlavaConfig",
    "PruneSIDLlavaForConditionalGeneration",
    "PruneSIDLlavaModel",
    "PruneSIDLlavaNextConfig",
    "PruneSIDLlavaNextForConditionalGeneration",
    "PruneSIDLlavaNextModel",
    "PruneSIDLlavaNextProcessor",
    "PruneSIDLlavaProcessor",
    "PruneSIDMiniGeminiConfig",
    "PruneSIDMiniGeminiForConditionalGeneration",
    "PruneSIDMiniGeminiModel",
    "PruneSIDMiniGeminiProcessor",
    "PruneSIDQwen2VLConfig",
    "PruneSIDQwen2VLForConditionalGeneration",
    "PruneSIDQwen2VLModel",
    "PruneSIDQwen2VLProcessor",
    "PruneSIDQwen2_5_VLConfig",
    "PruneSIDQwen2_5_VLForConditionalGeneration",
    "PruneSIDQwen2_5_VLModel",
    "PruneSIDQwen2_5_VLProcessor",
    "PruneSIDQwen3VLConfig",
    "PruneSIDQwen3VLForConditionalGeneration",
    "PruneSIDQwen3VLModel",
    "PruneSIDQwen3VLProcessor",
    "PruneSIDVideoLlavaConfig",
    "PruneSIDVideoLlavaForConditionalGeneration",
    "PruneSIDVideoLlavaModel",
    "PruneSIDVideoLlavaProcessor",
    "ViTCoPConfig",
    "ViTCoPLlavaConfig",
    "ViTCoPLlavaForConditionalGeneration",
    "ViTCoPLlavaModel",
    "ViTCoPLlavaProcessor",
]
