"""PruneSID for Transformers: the same model classes, a tenth of the visual tokens."""

import importlib

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .compress import compress
from .configuration_mini_gemini import MiniGeminiConfig
from .configuration_prunesid import PruneSIDConfig
from .methods import register_method
from .modeling_layer_pruned_llava import (
    LayerPrunedConfig,
    LayerPrunedLlavaAutoModel,
    LayerPrunedLlavaConfig,
    LayerPrunedLlavaForConditionalGeneration,
    LayerPrunedLlavaModel,
    LayerPrunedLlavaProcessor,
)
from .modeling_mini_gemini import MiniGeminiForConditionalGeneration, MiniGeminiModel
from .modeling_vitcop_llava import (
    ViTCoPConfig,
    ViTCoPLlavaAutoModel,
    ViTCoPLlavaConfig,
    ViTCoPLlavaForConditionalGeneration,
    ViTCoPLlavaModel,
    ViTCoPLlavaProcessor,
)
from .processing_mini_gemini import MiniGeminiProcessor


# The declared families: the end of their file's name, and the name in that of their classes.
FAMILIES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "mini_gemini": "MiniGemini",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen2_vl": "Qwen2VL",
    "qwen3_vl": "Qwen3VL",
    "video_llava": "VideoLlava",
}
_KINDS = ("Config", "Model", "ForConditionalGeneration", "Processor")

__all__ = [
    "LayerPrunedConfig",
    "LayerPrunedLlavaConfig",
    "LayerPrunedLlavaForConditionalGeneration",
    "LayerPrunedLlavaModel",
    "LayerPrunedLlavaProcessor",
    "MiniGeminiConfig",
    "MiniGeminiForConditionalGeneration",
    "MiniGeminiModel",
    "MiniGeminiProcessor",
    "PruneSIDConfig",
    "ViTCoPConfig",
    "ViTCoPLlavaConfig",
    "ViTCoPLlavaForConditionalGeneration",
    "ViTCoPLlavaModel",
    "ViTCoPLlavaProcessor",
    "compress",
    "register_method",
]


def family_class(stem: str) -> type:
    """The class with a head of a declared family."""
    module = importlib.import_module(f".modeling_prunesid_{stem}", __name__)
    return getattr(module, f"PruneSID{FAMILIES[stem]}ForConditionalGeneration")


def _register(config, auto_model, head, processor) -> None:
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, auto_model)
    AutoModelForImageTextToText.register(config, head)
    AutoModelForMultimodalLM.register(config, head)
    AutoProcessor.register(config, processor)


AutoConfig.register(PruneSIDConfig.model_type, PruneSIDConfig)
AutoConfig.register(ViTCoPConfig.model_type, ViTCoPConfig)
AutoConfig.register(LayerPrunedConfig.model_type, LayerPrunedConfig)
_register(MiniGeminiConfig, MiniGeminiModel, MiniGeminiForConditionalGeneration, MiniGeminiProcessor)
_register(ViTCoPLlavaConfig, ViTCoPLlavaAutoModel, ViTCoPLlavaForConditionalGeneration, ViTCoPLlavaProcessor)
_register(
    LayerPrunedLlavaConfig,
    LayerPrunedLlavaAutoModel,
    LayerPrunedLlavaForConditionalGeneration,
    LayerPrunedLlavaProcessor,
)
for _stem, _name in FAMILIES.items():
    _module = importlib.import_module(f".modeling_prunesid_{_stem}", __name__)
    _classes = {kind: getattr(_module, f"PruneSID{_name}{kind}") for kind in (*_KINDS, "AutoModel")}
    globals().update({f"PruneSID{_name}{kind}": _classes[kind] for kind in _KINDS})
    __all__ += [f"PruneSID{_name}{kind}" for kind in _KINDS]
    _register(*(_classes[kind] for kind in ("Config", "AutoModel", "ForConditionalGeneration", "Processor")))
