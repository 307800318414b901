"""Gemma 4 with PruneSID: tokens are compared as they enter the language model."""

from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Model, Gemma4Processor, GenerationMixin

from .configuration_prunesid import BehindConnectorConfig
from .family import PrunedGenerationMixin, PrunedModelMixin, register_family
from .processing import PrunedProcessorMixin


class PruneSIDGemma4Config(BehindConnectorConfig, Gemma4Config):
    """
    [`Gemma4Config`] with a nested [`PruneSIDConfig`], whose budget is that of each image and of each frame of a
    video.
    """

    model_type = "prunesid_gemma4"


class PruneSIDGemma4Model(PrunedModelMixin, Gemma4Model):
    """[`Gemma4Model`] with compressing `get_*_features`; see [`PrunedModelMixin`]."""

    config_class = PruneSIDGemma4Config
    along_prompt = {"per_layer_inputs": 0.0}

    def views(self, modality, inputs, sizes):
        if modality == "image":
            return super().views(modality, inputs, sizes)
        frames = inputs["num_frames_per_video"].tolist()
        return [[size // count] * count for size, count in zip(sizes, frames)]


class PruneSIDGemma4ForConditionalGeneration(PrunedGenerationMixin, Gemma4ForConditionalGeneration, GenerationMixin):
    """[`Gemma4ForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGemma4Model


class PruneSIDGemma4Processor(PrunedProcessorMixin, Gemma4Processor):
    """[`Gemma4Processor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGemma4AutoModel = register_family(PruneSIDGemma4ForConditionalGeneration, PruneSIDGemma4Processor)
