"""
The processors of Qwen-VL. The budget is a share of each image's own tokens, so that they write the full prompt, as the
stock processors do, and have no budget of their own: a call asks the model, `generate(..., num_visual_tokens=64)`.
"""

from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

from .processing_prunesid import VariantProcessorMixin


class PruneSIDQwen2VLProcessor(VariantProcessorMixin, Qwen2VLProcessor):
    """[`Qwen2VLProcessor`], which a thin variant takes from its base."""

    _auto_class = "AutoProcessor"


class PruneSIDQwen2_5_VLProcessor(VariantProcessorMixin, Qwen2_5_VLProcessor):
    """[`Qwen2_5_VLProcessor`], which a thin variant takes from its base."""

    _auto_class = "AutoProcessor"


class PruneSIDQwen3VLProcessor(VariantProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`], which a thin variant takes from its base."""

    _auto_class = "AutoProcessor"


__all__ = ["PruneSIDQwen2VLProcessor", "PruneSIDQwen2_5_VLProcessor", "PruneSIDQwen3VLProcessor"]
