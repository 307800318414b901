"""What Llama 4 of Transformers 5.24.0 reads of its language model's output, which lacks it, so that it raises."""

from typing import Any

from torch import nn
from transformers.utils import ModelOutput


def add_image_outputs(language_model: nn.Module) -> None:
    """The output of a language model has `image_outputs` from now on: None."""
    if not getattr(language_model, "_prunesid_image_outputs", False):
        language_model.register_forward_hook(_add_to_output)
        language_model._prunesid_image_outputs = True


def _add_to_output(module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, ModelOutput) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
    return output
