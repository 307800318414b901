"""LLaVA-1.5 with PruneSID: tokens are chosen from the tower's features, and only the kept ones are projected."""

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LlavaForConditionalGeneration, LlavaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector, LlavaPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .co_pruning_prunesid import CoPrunedGenerationMixin, CoPrunedModelMixin, describe_tokens
from .compression_prunesid import CompressedModelMixin
from .configuration_prunesid import PruneSIDLlavaConfig
from .generation_prunesid import CompressedGenerationMixin
from .hub_prunesid import AutoModelMixin, HubModelMixin, register_class_names
from .processing_prunesid import PruneSIDLlavaProcessor
from .selection_prunesid import resolve_budget
from .tower_prunesid import resolve_layer, run_tower
from .upstream_prunesid import like_upstream
from .views_prunesid import choose_tokens, project_if_compared, requested_budgets
from .vitcop_prunesid import plan_counts, scaled_layers


class PruneSIDLlavaModel(CoPrunedModelMixin, CompressedModelMixin, HubModelMixin, LlavaModel):
    """
    Modifications:
        - `get_image_features` returns the features of the kept tokens alone, with their indices.
        - `forward` drops the placeholders of the other tokens from the prompt.
        - with `prunesid_config.llm_budget`, `forward` drops further tokens between the layers of the language model.
    """

    config: PruneSIDLlavaConfig
    config_class = PruneSIDLlavaConfig
    _auto_class = "AutoModel"
    _auto_map = {"AutoModel": "PruneSIDLlavaModel"}

    def __init__(self, config: PruneSIDLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        vision = self.config.vision_config
        full = (vision.image_size // vision.patch_size) ** 2
        full += self.config.vision_feature_select_strategy == "full"
        short = min(resolve_budget(self.config.prunesid_config.budget, full), full)
        return any(all(length % tokens == 0 for length in run_lengths) for tokens in (full, short))

    def pruning_layers(self) -> tuple[int, int]:
        return scaled_layers(len(self.language_model.layers))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes images, keeps N tokens of each and projects these.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`).
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.

        Returns:
            Upstream's output, whose `pooler_output` is a list of `(N, hidden_size)` for each image. Where tokens were
            dropped it also has `keep_indices`, a list of `(N,)` ascending indices into upstream's T tokens (-1 is a
            CLS token that upstream leaves out), and `num_placeholders`, T of each image; with
            `prunesid_config.llm_budget` also `visual_groups`, a list of `(N, 4)` (see `describe_tokens`).

        Raises:
            `ValueError`: for an invalid budget or layer, or a tower that cannot give what the configuration asks for.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        settings, tower = self.config.prunesid_config, self.vision_tower
        patch_size, (height, width) = tower.config.patch_size, pixel_values.shape[-2:]
        num_patches, num_images = (height // patch_size) * (width // patch_size), len(pixel_values)
        budgets = requested_budgets(settings, num_visual_tokens, num_images, num_patches)
        if budgets is None and settings.llm_budget is not None:
            budgets = [num_patches] * num_images
        if budgets is None:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                image_sizes=image_sizes,
                return_dict=True,
                **kwargs,
            )
        if image_sizes is not None:
            raise ValueError(
                f"image_sizes={image_sizes!r} are for towers without a fixed grid (Pixtral), which PruneSID for LLaVA "
                "does not compress. Set prunesid_config.budget=None for them."
            )

        num_layers = tower.config.num_hidden_layers
        layers = [layer] if isinstance(layer, int) else layer
        layers = [resolve_layer(index, num_layers, "vision_feature_layer") for index in layers]
        selection_layer = resolve_layer(settings.layer, num_layers, "prunesid_config.layer")
        states = run_tower(
            tower,
            pixel_values,
            [*layers, selection_layer],
            cls_attention_layer=selection_layer if settings.score == "cls_attention" else None,
            **kwargs,
        )

        features = torch.cat([states.hidden_states[index] for index in layers], dim=-1)
        # CLS and register tokens come before the patches. Upstream's "default" leaves the first one out; what it feeds
        # to the language model is kept, within the budget.
        num_prefix = features.shape[1] - num_patches
        first = 1 if strategy == "default" and num_prefix and not settings.keep_cls else 0
        kept_patches = choose_tokens(
            settings,
            states.hidden_states[selection_layer][:, num_prefix:],
            budgets,
            is_dynamic=settings.dynamic and num_visual_tokens is None,
            extra_kept=num_prefix - first,
            cls_attention=None if states.cls_attention is None else states.cls_attention[:, num_prefix:],
            projected=project_if_compared(settings, self.multi_modal_projector, features[:, num_prefix:]),
        )
        prefix = torch.arange(first, num_prefix, device=features.device)
        kept = [torch.cat([prefix, patches.to(features.device) + num_prefix]) for patches in kept_patches]
        image_features = self.multi_modal_projector(torch.cat([view[rows] for view, rows in zip(features, kept)]))

        dropped_by_upstream = 1 if strategy == "default" and num_prefix else 0
        outputs = states.outputs
        outputs.pooler_output = list(image_features.split([len(rows) for rows in kept]))
        outputs["keep_indices"] = [rows - dropped_by_upstream for rows in kept]
        outputs["num_placeholders"] = [features.shape[1] - dropped_by_upstream] * num_images
        if settings.llm_budget is not None:
            target, num_layers = resolve_budget(settings.llm_budget, num_patches), len(self.language_model.layers)
            outputs["visual_groups"] = [
                describe_tokens(
                    image, torch.zeros_like(rows), plan_counts(target, len(rows), num_layers, *self.pruning_layers())
                )
                for image, rows in enumerate(kept)
            ]
        return outputs

    @like_upstream(LlavaModel.forward)
    def forward(
        self,
        *,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        visual_groups: torch.LongTensor | None = None,
        **inputs,
    ):
        r"""
        Upstream's `forward` on the shortened prompt.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.
            visual_groups (`torch.LongTensor` of shape `(batch, columns, 4)`, *optional*):
                Made by `generate` and the head's `forward` for tokens that are dropped inside the language model.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image.
        """
        return self.forward_compressed(
            super().forward, num_visual_tokens=num_visual_tokens, visual_groups=visual_groups, **inputs
        )


class PruneSIDLlavaForConditionalGeneration(
    CoPrunedGenerationMixin, CompressedGenerationMixin, HubModelMixin, LlavaForConditionalGeneration, GenerationMixin
):
    """
    Modifications:
        - `forward` and `generate` shorten the prompt at their entrance, labels included.
        - the output of `forward` has the caller's columns, and `keep_mask`, which tells those that remain.
    """

    config: PruneSIDLlavaConfig
    config_class = PruneSIDLlavaConfig
    _auto_class = "AutoModelForImageTextToText"
    _auto_map = {
        "AutoModel": "PruneSIDLlavaAutoModel",
        "AutoModelForImageTextToText": "PruneSIDLlavaForConditionalGeneration",
        "AutoModelForMultimodalLM": "PruneSIDLlavaForConditionalGeneration",
    }
    _processor_class = PruneSIDLlavaProcessor

    def __init__(self, config: PruneSIDLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = PruneSIDLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @like_upstream(LlavaForConditionalGeneration.get_image_features)
    def get_image_features(
        self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs
    ):
        """See [`PruneSIDLlavaModel.get_image_features`]."""
        return self.model.get_image_features(num_visual_tokens=num_visual_tokens, **inputs)

    @like_upstream(LlavaForConditionalGeneration.forward)
    def forward(
        self,
        *,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        visual_groups: torch.LongTensor | None = None,
        **inputs,
    ):
        r"""
        Upstream's `forward` on the shortened prompt; logits and hidden states have the caller's columns.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.
            visual_groups (`torch.LongTensor` of shape `(batch, columns, 4)`, *optional*):
                Made by `generate` for tokens that are dropped inside the language model.

        Returns:
            Upstream's output. Where the prompt was shortened it also has `keep_mask`, of shape `(batch, full_length)`:
            the columns of the caller's prompt that remain. A dropped column has the logits and hidden states of
            the last one before it that remains. Attentions and caches have the short length. With
            `prunesid_config.llm_budget` it has `layer_visual_tokens`, of shape `(batch, layers)`: how many visual
            tokens each layer saw.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image.
        """
        return self.forward_compressed(
            super().forward, num_visual_tokens=num_visual_tokens, visual_groups=visual_groups, **inputs
        )


class PruneSIDLlavaAutoModel(AutoModelMixin, PruneSIDLlavaModel):
    """See [`AutoModelMixin`]."""

    _base_class = PruneSIDLlavaModel
    _generating_class = PruneSIDLlavaForConditionalGeneration


# Stock checkpoints load by the stock conversions, which Transformers looks up by the name of the class.
for _ours, _stock in (("PruneSIDLlavaForConditionalGeneration", "llava"), ("PruneSIDLlavaModel", "LlavaModel")):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_stock), overwrite=True)
register_class_names(PruneSIDLlavaConfig.model_type, "PruneSIDLlavaForConditionalGeneration", "PruneSIDLlavaModel")

__all__ = ["PruneSIDLlavaAutoModel", "PruneSIDLlavaForConditionalGeneration", "PruneSIDLlavaModel"]
