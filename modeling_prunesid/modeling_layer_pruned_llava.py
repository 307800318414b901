"""
LLaVA-1.5 with PruneSID and, as in ViTCoP, tokens that are dropped inside the language model. This is ours: N tokens
enter it, and in front of two of its layers those of smallest key norm stay, so that `llm_budget` is the mean number of
visual tokens over its layers.
"""

import torch
from transformers import GenerationMixin, LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor

from .budgets import Budgets
from .checks import resolve_budget
from .co_pruning import CoPrunedGenerationMixin, CoPrunedModelMixin, describe_tokens
from .configuration_prunesid import NestsPruneSIDConfig, PruneSIDConfig, is_budget
from .encoding import TowerEncoding, TowerModelMixin
from .family import PrunedGenerationMixin, register_family
from .processing import PrunedProcessorMixin
from .vitcop import plan_counts, scaled_layers


class LayerPrunedConfig(PruneSIDConfig):
    """
    [`PruneSIDConfig`] with one more field.

    Args:
        llm_budget (`int` or `float`, *optional*):
            The mean number of visual tokens of an image over the layers of the language model, as a count or a share
            of its tokens. None drops nothing there.
    """

    model_type = "prunesid_layer_pruned"
    _rules = {**PruneSIDConfig._rules, "llm_budget": (is_budget, "a positive integer, a float in (0, 1] or None")}

    llm_budget: int | float | None = None

    def check(self) -> None:
        super().check()
        if isinstance(self.budget, int) and isinstance(self.llm_budget, int) and self.llm_budget > self.budget:
            raise ValueError(
                f"prunesid_config.llm_budget={self.llm_budget}, the mean over the layers, exceeds "
                f"budget={self.budget}, the tokens that enter them. Raise budget, or lower llm_budget."
            )


class LayerPrunedLlavaConfig(NestsPruneSIDConfig, LlavaConfig):
    """[`LlavaConfig`] with a nested [`LayerPrunedConfig`]."""

    model_type = "prunesid_layer_pruned_llava"
    _settings_class = LayerPrunedConfig


class _GroupedEncoding(TowerEncoding):
    """Says for every token that enters the language model how many of its image stay in front of which layer."""

    def __init__(self, model, modality, num_visual_tokens, inputs):
        super().__init__(model, modality, num_visual_tokens, inputs)
        self.num_layers, self.layers = len(model.language_model.layers), model.pruning_layers()
        if self.budgets is None and self.settings.llm_budget is not None:
            totals = [sum(own) for own in self.num_tokens]
            self.budgets = Budgets(totals, "equal", self.num_tokens, extra_kept=self.num_extra)

    def _finish(self, output, projected_cls):
        output = super()._finish(output, projected_cls)
        if self.settings.llm_budget is not None:
            kept = output["keep_indices"]
            targets = [resolve_budget(self.settings.llm_budget, sum(own)) for own in self.num_tokens]
            counts = [plan_counts(n, len(own), self.num_layers, *self.layers) for n, own in zip(targets, kept)]
            describe_tokens(output, [torch.zeros_like(own) for own in kept], counts, [1] * len(kept))
        return output


class LayerPrunedLlavaModel(CoPrunedModelMixin, TowerModelMixin, LlavaModel):
    """[`LlavaModel`] with a compressing `get_image_features`, and layers that drop tokens."""

    config_class = LayerPrunedLlavaConfig
    towers = {"image": "vision_tower"}
    projector_name = "multi_modal_projector"
    encoding_class = _GroupedEncoding

    def is_off(self, num_visual_tokens) -> bool:
        return super().is_off(num_visual_tokens) and self.config.prunesid_config.llm_budget is None

    def pruning_layers(self) -> tuple[int, int]:
        return scaled_layers(len(self.language_model.layers))


class LayerPrunedLlavaForConditionalGeneration(
    CoPrunedGenerationMixin, PrunedGenerationMixin, LlavaForConditionalGeneration, GenerationMixin
):
    """[`LlavaForConditionalGeneration`] on shortened prompts, and with layers that drop tokens."""

    model_class = LayerPrunedLlavaModel


class LayerPrunedLlavaProcessor(PrunedProcessorMixin, LlavaProcessor):
    """[`LlavaProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


LayerPrunedLlavaAutoModel = register_family(LayerPrunedLlavaForConditionalGeneration, LayerPrunedLlavaProcessor)
