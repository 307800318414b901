"""Inkling with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    InklingConfig,
    InklingForConditionalGeneration,
    InklingModel,
    InklingProcessor,
)

from .connector import BehindConnectorModelMixin
from .family import PrunedGenerationMixin, register_family
from .no_cls import BehindConnectorConfig
from .processing import PrunedProcessorMixin


class PruneSIDInklingConfig(BehindConnectorConfig, InklingConfig):
    """[`InklingConfig`] with a nested [`PruneSIDConfig`], whose budget is that of each image."""

    model_type = "prunesid_inkling_mm_model"


class PruneSIDInklingModel(BehindConnectorModelMixin, InklingModel):
    """[`InklingModel`] with a compressing `get_image_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDInklingConfig
    pools_tensor, own_arguments = ("image",), ("num_patches",)  # of each image; upstream has no need of them

    def views(self, modality, inputs, sizes):
        counts = inputs.get("num_patches")
        if counts is None or int(torch.as_tensor(counts).sum()) != len(sizes):
            raise ValueError(
                f"num_patches must say how many of the {len(sizes)} encoded patches each image has, got {counts!r}. "
                "Pass it as our processor returns it."
            )
        return [[count] for count in torch.as_tensor(counts).tolist()]

    def sizes_of(self, modality, inputs):
        return [1] * len(inputs["pixel_values"])

    def num_images(self, inputs):
        return len(inputs["num_patches"])


class PruneSIDInklingForConditionalGeneration(PrunedGenerationMixin, InklingForConditionalGeneration, GenerationMixin):
    """[`InklingForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDInklingModel


class PruneSIDInklingProcessor(PrunedProcessorMixin, InklingProcessor):
    """[`InklingProcessor`] that writes short prompts, and returns `num_patches`; see [`PrunedProcessorMixin`]."""

    @property
    def unused_input_names(self):
        return [name for name in super().unused_input_names if name != "num_patches"]


PruneSIDInklingAutoModel = register_family(PruneSIDInklingForConditionalGeneration, PruneSIDInklingProcessor)
