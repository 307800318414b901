"""Nemotron H Omni with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3Processor,
)

from .family import register_family
from .frames import FramesModelMixin
from .no_cls import BehindConnectorConfig
from .own_call import OwnCallProcessorMixin
from .shared_id import SharedIdModelMixin, SharedIdProcessorMixin
from .whole import PrunedWholeMixin


class PruneSIDNemotronHOmniConfig(BehindConnectorConfig, NemotronH_Omni_Reasoning_V3_Config):
    """[`NemotronH_Omni_Reasoning_V3_Config`] with a nested [`PruneSIDConfig`]: the budget of each image and slice."""

    model_type = "prunesid_nemotron_h_omni"


class PruneSIDNemotronHOmniForConditionalGeneration(
    FramesModelMixin, SharedIdModelMixin, PrunedWholeMixin, NemotronH_Omni_Reasoning_V3, GenerationMixin
):
    """[`NemotronH_Omni_Reasoning_V3`] on shortened prompts; see [`PrunedWholeMixin`]."""

    config_class = PruneSIDNemotronHOmniConfig
    views_apart = ("video",)
    reads_logits_to_keep = True

    def patches_of(self, attention):
        return attention[:, self.vision_model.config.num_summary_tokens :]

    def patch_grids(self, modality, inputs, num_patches):
        if modality == "image":
            return torch.nn.functional.pad(inputs["image_grid_hw"], (1, 0), value=1)
        videos, slices, _, *size = inputs["pixel_values_videos"].shape
        return torch.tensor([[slices, *(side // self.vision_model.config.patch_size for side in size)]] * videos)

    def views(self, modality, inputs, sizes):
        if modality == "video" and self.video_pruning_rate > 0:
            raise ValueError(
                f"video_pruning_rate={self.video_pruning_rate} is upstream's own pruning of videos, which this class "
                "replaces. Pass video_pruning_rate=0 to from_pretrained."
            )
        return super().views(modality, inputs, sizes)


class PruneSIDNemotronHOmniProcessor(
    SharedIdProcessorMixin, OwnCallProcessorMixin, NemotronH_Omni_Reasoning_V3Processor
):
    """[`NemotronH_Omni_Reasoning_V3Processor`] that writes short prompts; see [`OwnCallProcessorMixin`]."""


PruneSIDNemotronHOmniAutoModel = register_family(
    PruneSIDNemotronHOmniForConditionalGeneration, PruneSIDNemotronHOmniProcessor
)
