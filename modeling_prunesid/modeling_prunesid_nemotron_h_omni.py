"""Nemotron H Omni with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3Processor,
)

from .configuration_prunesid import BehindConnectorConfig
from .family import register_family
from .processing import PrunedProcessorMixin
from .whole import PrunedWholeMixin


class PruneSIDNemotronHOmniConfig(BehindConnectorConfig, NemotronH_Omni_Reasoning_V3_Config):
    """
    [`NemotronH_Omni_Reasoning_V3_Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image and of
    each slice of a video.
    """

    model_type = "prunesid_nemotron_h_omni"


class PruneSIDNemotronHOmniForConditionalGeneration(PrunedWholeMixin, NemotronH_Omni_Reasoning_V3, GenerationMixin):
    """[`NemotronH_Omni_Reasoning_V3`] on shortened prompts; see [`PrunedWholeMixin`]."""

    config_class = PruneSIDNemotronHOmniConfig

    def patches_of(self, attention):
        return attention[:, self.vision_model.config.num_summary_tokens :]

    def patch_grids(self, modality, inputs, num_patches):
        return torch.nn.functional.pad(inputs["image_grid_hw"], (1, 0), value=1) if modality == "image" else None

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        slices = inputs["pixel_values_videos"].shape[1]
        return [[size // slices] * slices for size in sizes]


class PruneSIDNemotronHOmniProcessor(PrunedProcessorMixin, NemotronH_Omni_Reasoning_V3Processor):
    """[`NemotronH_Omni_Reasoning_V3Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDNemotronHOmniAutoModel = register_family(
    PruneSIDNemotronHOmniForConditionalGeneration, PruneSIDNemotronHOmniProcessor
)
