"""Mini-Gemini with PruneSID: tokens are chosen from the final image tokens, and only the kept ones are projected."""

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .compression_prunesid import CompressedModelMixin
from .configuration_prunesid import refuse_cls
from .configuration_prunesid_mini_gemini import PruneSIDMiniGeminiConfig
from .generation_prunesid import CompressedGenerationMixin
from .hub_prunesid import AutoModelMixin, HubModelMixin, register_class_names
from .modeling_mini_gemini import MiniGeminiForConditionalGeneration, MiniGeminiModel
from .processing_prunesid_mini_gemini import PruneSIDMiniGeminiProcessor
from .selection_prunesid import resolve_budget
from .upstream_prunesid import like_upstream
from .views_prunesid import choose_tokens, project_if_compared, requested_budgets


class PruneSIDMiniGeminiModel(CompressedModelMixin, HubModelMixin, MiniGeminiModel):
    """
    Modifications:
        - `get_image_features` returns the features of the kept tokens alone, with their indices.
        - `forward` drops the placeholders of the other tokens from the prompt.
    """

    config: PruneSIDMiniGeminiConfig
    config_class = PruneSIDMiniGeminiConfig
    _auto_class = "AutoModel"
    _auto_map = {"AutoModel": "PruneSIDMiniGeminiModel"}

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        full = self.config.num_image_tokens
        short = min(resolve_budget(self.config.prunesid_config.budget, full), full)
        return any(all(length % tokens == 0 for length in run_lengths) for tokens in (full, short))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes images, keeps N tokens of each and projects these.

        Args:
            pixel_values, high_res_pixel_values: as for [`MiniGeminiModel.get_image_features`].
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.

        Returns:
            Upstream's output, whose `pooler_output` is a list of `(N, hidden_size)` for each image. Where tokens were
            dropped it also has `keep_indices`, a list of `(N,)` ascending indices into upstream's T tokens, and
            `num_placeholders`, T of each image.

        Raises:
            `ValueError`: for an invalid budget, settings that need a CLS token, or images of other shapes than the
                configuration describes.
        """
        settings = self.config.prunesid_config
        outputs, tokens = self.get_image_tokens(
            pixel_values, high_res_pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        num_images, num_tokens = tokens.shape[:2]
        budgets = requested_budgets(settings, num_visual_tokens, num_images, num_tokens)
        if budgets is None:
            outputs.pooler_output = list(self.multi_modal_projector(tokens))
            return outputs

        refuse_cls(settings, "it compares the final image tokens, among which is no CLS token")
        is_dynamic = settings.dynamic and num_visual_tokens is None
        projected = project_if_compared(settings, self.multi_modal_projector, tokens)
        kept = choose_tokens(settings, tokens, budgets, is_dynamic, projected=projected)
        kept = [rows.to(tokens.device) for rows in kept]
        features = self.multi_modal_projector(torch.cat([image[rows] for image, rows in zip(tokens, kept)]))
        outputs.pooler_output = list(features.split([len(rows) for rows in kept]))
        outputs["keep_indices"] = kept
        outputs["num_placeholders"] = [num_tokens] * num_images
        return outputs

    @like_upstream(MiniGeminiModel.forward)
    def forward(self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs):
        r"""
        Upstream's `forward` on the shortened prompt.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image.
        """
        return self.forward_compressed(super().forward, num_visual_tokens=num_visual_tokens, **inputs)


class PruneSIDMiniGeminiForConditionalGeneration(
    CompressedGenerationMixin, HubModelMixin, MiniGeminiForConditionalGeneration, GenerationMixin
):
    """
    Modifications:
        - `forward` and `generate` shorten the prompt at their entrance, labels included.
        - the output of `forward` has the caller's columns, and `keep_mask`, which tells those that remain.
    """

    config: PruneSIDMiniGeminiConfig
    config_class = PruneSIDMiniGeminiConfig
    _auto_class = "AutoModelForImageTextToText"
    _auto_map = {
        "AutoModel": "PruneSIDMiniGeminiAutoModel",
        "AutoModelForImageTextToText": "PruneSIDMiniGeminiForConditionalGeneration",
        "AutoModelForMultimodalLM": "PruneSIDMiniGeminiForConditionalGeneration",
    }
    _processor_class = PruneSIDMiniGeminiProcessor

    def __init__(self, config: PruneSIDMiniGeminiConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = PruneSIDMiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @like_upstream(MiniGeminiForConditionalGeneration.get_image_features)
    def get_image_features(
        self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs
    ):
        """See [`PruneSIDMiniGeminiModel.get_image_features`]."""
        return self.model.get_image_features(num_visual_tokens=num_visual_tokens, **inputs)

    @like_upstream(MiniGeminiForConditionalGeneration.forward)
    def forward(self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs):
        r"""
        Upstream's `forward` on the shortened prompt; logits and hidden states have the caller's columns.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.

        Returns:
            Upstream's output. Where the prompt was shortened it also has `keep_mask`, of shape `(batch, full_length)`:
            the columns of the caller's prompt that remain. A dropped column has the logits and hidden states of
            the last one before it that remains. Attentions and caches have the short length.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image.
        """
        return self.forward_compressed(super().forward, num_visual_tokens=num_visual_tokens, **inputs)


class PruneSIDMiniGeminiAutoModel(AutoModelMixin, PruneSIDMiniGeminiModel):
    """See [`AutoModelMixin`]."""

    _base_class = PruneSIDMiniGeminiModel
    _generating_class = PruneSIDMiniGeminiForConditionalGeneration


# Checkpoints of `MiniGeminiForConditionalGeneration` have the names of our modules: there is no conversion to pass on.
register_class_names(
    PruneSIDMiniGeminiConfig.model_type, "PruneSIDMiniGeminiForConditionalGeneration", "PruneSIDMiniGeminiModel"
)

__all__ = [
    "PruneSIDMiniGeminiAutoModel",
    "PruneSIDMiniGeminiForConditionalGeneration",
    "PruneSIDMiniGeminiModel",
]
