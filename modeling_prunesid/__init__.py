"""PruneSID for Transformers: the same model classes, a tenth of the visual tokens."""

import importlib
import sys
from typing import Any

from .configuration_prunesid import PruneSIDConfig  # first: it checks the version of Transformers


# isort: split
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from .auto import PruneSIDForImageTextToText
from .compress import compress
from .configuration_mini_gemini import MiniGeminiConfig
from .families import FAMILIES, release_with
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
from .registering import register_method
from .visualize import explain, visualize


__version__ = "0.2.0"

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
    "PruneSIDForImageTextToText",
    "ViTCoPConfig",
    "ViTCoPLlavaConfig",
    "ViTCoPLlavaForConditionalGeneration",
    "ViTCoPLlavaModel",
    "ViTCoPLlavaProcessor",
    "compress",
    "explain",
    "register_method",
    "visualize",
]


def family_class(stem: str) -> type:
    """The class with a head of a declared family."""
    return getattr(sys.modules[__name__], f"PruneSID{FAMILIES[stem]}ForConditionalGeneration")


def _register(config, auto_model, head, processor) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
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

# A family is imported when one of its classes is asked for, by name or by an Auto class that reads its `model_type`.
_STEMS: dict[str, str] = {}
for _stem, _family in FAMILIES.items():
    _STEMS |= {f"PruneSID{_family}{kind}": _stem for kind in _KINDS}
    if release_with(_stem) is None:
        __all__ += [f"PruneSID{_family}{kind}" for kind in _KINDS]
        CONFIG_MAPPING_NAMES[f"prunesid_{_stem}"] = f"PruneSID{_family}Config"
        PROCESSOR_MAPPING_NAMES[f"prunesid_{_stem}"] = (f"PruneSID{_family}Processor",)
        # The module in which Transformers looks these names up.
        sys.modules[f"transformers.models.prunesid_{_stem}"] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    stem = _STEMS.get(name)
    if stem is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    release = release_with(stem)
    if release is not None:
        raise AttributeError(
            f"{name} needs Transformers {release}, which has the model; {transformers.__version__} is installed. "
            f"Run pip install 'transformers>={release}'."
        )
    module, family = importlib.import_module(f".modeling_prunesid_{stem}", __name__), FAMILIES[stem]
    classes = {kind: getattr(module, f"PruneSID{family}{kind}", None) for kind in (*_KINDS, "AutoModel")}
    if classes["Model"] is None:  # a head without a base model of its own
        classes["Model"] = classes["ForConditionalGeneration"]
    globals().update({f"PruneSID{family}{kind}": classes[kind] for kind in _KINDS})
    _register(*(classes[kind] for kind in ("Config", "AutoModel", "ForConditionalGeneration", "Processor")))
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
