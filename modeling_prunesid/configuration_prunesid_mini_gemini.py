"""The configuration of Mini-Gemini that carries the settings of PruneSID."""

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from .configuration_mini_gemini import MiniGeminiConfig
from .configuration_prunesid import NestsPruneSIDConfig, register_class_names


@strict
class PruneSIDMiniGeminiConfig(NestsPruneSIDConfig, MiniGeminiConfig):
    r"""
    [`MiniGeminiConfig`] with a nested [`PruneSIDConfig`].

    Args:
        prunesid_config (`dict` or `PruneSIDConfig`, *optional*):
            How visual tokens are chosen; the budget is that of each image, with all of its tiles in Mini-Gemini-HD.
            `layer` has no meaning here: the final image tokens are compared. A dict passed to `from_pretrained` is
            merged into the saved one.
    """

    model_type = "prunesid_mini_gemini"

    prunesid_config: dict | PretrainedConfig | None = None


register_class_names(PruneSIDMiniGeminiConfig)

__all__ = ["PruneSIDMiniGeminiConfig"]
