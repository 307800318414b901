"""VideoLLaMA 3 with PruneSID: tokens are compared as they enter the language model."""

import torch
from transformers import (
    GenerationMixin,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Model,
    VideoLlama3Processor,
)

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDVideoLlama3Config(BehindConnectorConfig, VideoLlama3Config):
    """[`VideoLlama3Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image and of each frame."""

    model_type = "prunesid_video_llama_3"


class PruneSIDVideoLlama3Model(PrunedModelMixin, VideoLlama3Model):
    """[`VideoLlama3Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDVideoLlama3Config
    views_apart = ("video",)
    own_arguments = ("video_compression_mask",)

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        frames = inputs["video_grid_thw"][:, 0].tolist()
        kept = [mask.view(count, -1).sum(1).tolist() for mask, count in zip(self._masks(inputs), frames)]
        return [[tokens for tokens in own if tokens] for own in kept]

    def _masks(self, inputs):
        """Which tokens of each clip its processor has left."""
        sizes = (inputs["video_grid_thw"].prod(1) // inputs["video_merge_sizes"] ** 2).tolist()
        mask = inputs.get("video_compression_mask")
        return (torch.ones(sum(sizes), dtype=torch.bool) if mask is None else mask.cpu()).split(sizes)

    def complete(self, modality, output, inputs):
        """Upstream's `forward` applies `video_compression_mask`, but tokens are chosen of those that it leaves."""
        if modality == "video":
            clips = zip(output.pooler_output, self._masks(inputs))
            output.pooler_output = [clip[mask.to(clip.device)] for clip, mask in clips]
        return output

    def pool_attention(self, patches, modality, inputs, num_tokens):
        grids, merged = inputs[f"{modality}_grid_thw"], inputs[f"{modality}_merge_sizes"].tolist()
        own = [part.view(-1, side**2).mean(1) for part, side in zip(patches.split(grids.prod(-1).tolist()), merged)]
        if modality == "video":
            own = [tokens[mask.to(tokens.device)] for tokens, mask in zip(own, self._masks(inputs))]
        return torch.cat(own)


class PruneSIDVideoLlama3ForConditionalGeneration(
    PrunedGenerationMixin, VideoLlama3ForConditionalGeneration, GenerationMixin
):
    """[`VideoLlama3ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDVideoLlama3Model


class PruneSIDVideoLlama3Processor(PrunedProcessorMixin, VideoLlama3Processor):
    """[`VideoLlama3Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDVideoLlama3AutoModel = register_family(
    PruneSIDVideoLlama3ForConditionalGeneration, PruneSIDVideoLlama3Processor
)
