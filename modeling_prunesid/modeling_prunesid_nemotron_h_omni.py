"""Nemotron H Omni with PruneSID: tokens are compared as they enter the language model."""

import copy

import torch
from transformers import (
    GenerationMixin,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3Processor,
)

from .configuration_prunesid import BehindConnectorConfig
from .family import register_family
from .processing import OF_VIDEOS, PrunedProcessorMixin, check_request
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
    views_apart = ("video",)
    hands_on_logits_to_keep = True

    def patches_of(self, attention):
        return attention[:, self.vision_model.config.num_summary_tokens :]

    def patch_grids(self, modality, inputs, num_patches):
        if modality == "image":
            return torch.nn.functional.pad(inputs["image_grid_hw"], (1, 0), value=1)
        videos, slices, _, *size = inputs["pixel_values_videos"].shape
        return torch.tensor([[slices, *(side // self.vision_model.config.patch_size for side in size)]] * videos)

    def find_placeholders(self, modality, input_ids, inputs_embeds):
        """The placeholder of images, for videos too: a prompt has the ones or the others."""
        return super().find_placeholders("image", input_ids, inputs_embeds)

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        if self.video_pruning_rate > 0:
            raise ValueError(
                f"video_pruning_rate={self.video_pruning_rate} is upstream's own pruning of videos, which this class "
                "replaces. Pass video_pruning_rate=0 to from_pretrained."
            )
        shape = tuple(inputs["pixel_values_videos"].shape)
        if len(shape) != 5:
            raise ValueError(
                "pixel_values_videos must be (videos, slices, channels, height, width), as made by Transformers 5.24 "
                f"and later, got {shape}. Upgrade Transformers, or set budget=None for videos."
            )
        slices = shape[1]
        return [[size // slices] * slices for size in sizes]


class PruneSIDNemotronHOmniProcessor(PrunedProcessorMixin, NemotronH_Omni_Reasoning_V3Processor):
    """
    [`NemotronH_Omni_Reasoning_V3Processor`] that writes short prompts; see [`PrunedProcessorMixin`]. Upstream's calls
    what writes an input's text directly, and without the arguments of the call.
    """

    def __call__(self, *args, **kwargs):
        settings = [dict(kwargs.get(name) or {}) for name in ("images_kwargs", "videos_kwargs")]
        asked = [given.pop("num_visual_tokens", None) for given in (kwargs, *settings)]
        asked = next((budget for budget in asked if budget is not None), None)
        check_request(asked)
        processor = self
        if asked is not None:
            processor = copy.copy(self)
            processor.num_visual_tokens = asked
        kwargs |= {name: own for name, own in zip(("images_kwargs", "videos_kwargs"), settings) if own}
        return super(PruneSIDNemotronHOmniProcessor, processor).__call__(*args, **kwargs)

    def _placeholder(self, modality):
        return super()._placeholder("image")

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        text = super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self._write_one("image", image_inputs, image_idx, text)

    def replace_video_token(self, video_inputs, video_idx, **kwargs):
        text = super().replace_video_token(video_inputs, video_idx, **kwargs)
        return self._write_one("video", video_inputs, video_idx, text)

    def _write_one(self, modality, inputs, index, text):
        text = self._shorten(text, modality, inputs, index, None)
        if not self._writes_full(None):
            name = "num_visual_tokens" if modality == "image" else OF_VIDEOS
            inputs.setdefault(name, []).append(text.count(self._placeholder(modality)))
        return text


PruneSIDNemotronHOmniAutoModel = register_family(
    PruneSIDNemotronHOmniForConditionalGeneration, PruneSIDNemotronHOmniProcessor
)
