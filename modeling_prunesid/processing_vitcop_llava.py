"""The processor of ViTCoP models: the stock prompts, published with the model."""

from transformers import LlavaProcessor, PretrainedConfig

from .processing_prunesid import VariantProcessorMixin


class ViTCoPLlavaProcessor(VariantProcessorMixin, LlavaProcessor):
    """
    [`LlavaProcessor`] under the name that a ViTCoP repo publishes. It writes the full prompt: most tokens are dropped
    inside the language model, where no prompt can leave them out.
    """

    _auto_class = "AutoProcessor"

    @classmethod
    def arguments_for(cls, settings: PretrainedConfig) -> dict:
        return {}


__all__ = ["ViTCoPLlavaProcessor"]
