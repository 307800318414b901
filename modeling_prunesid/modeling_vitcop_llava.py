"""LLaVA-1.5 with ViTCoP: salient tokens leave the tower, and are merged and dropped inside the language model."""

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
from .configuration_vitcop import ViTCoPLlavaConfig
from .generation_prunesid import CompressedGenerationMixin
from .hub_prunesid import AutoModelMixin, HubModelMixin, register_class_names
from .processing_vitcop_llava import ViTCoPLlavaProcessor
from .selection_prunesid import resolve_budget
from .tower_prunesid import resolve_layer, run_tower
from .upstream_prunesid import like_upstream
from .views_prunesid import requested_budgets
from .vitcop_prunesid import (
    cluster_tokens,
    count_of_share,
    default_shares,
    merge_clusters,
    plan_counts,
    scaled_layers,
    select_salient,
)


class ViTCoPLlavaModel(CoPrunedModelMixin, CompressedModelMixin, HubModelMixin, LlavaModel):
    """
    Modifications:
        - `get_image_features` returns the features of the salient tokens alone, with their indices and clusters.
        - `forward` drops the placeholders of the other tokens from the prompt.
        - `forward` merges and drops tokens between the layers of the language model.
    """

    config: ViTCoPLlavaConfig
    config_class = ViTCoPLlavaConfig
    _auto_class = "AutoModel"
    _auto_map = {"AutoModel": "ViTCoPLlavaModel"}
    _first_rule = staticmethod(merge_clusters)

    def __init__(self, config: ViTCoPLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        vision = self.config.vision_config
        num_patches = (vision.image_size // vision.patch_size) ** 2
        full = num_patches + (self.config.vision_feature_select_strategy == "full")
        budget = self.config.vitcop_config.budget
        short = full if budget is None else self._plan_tower(resolve_budget(budget, num_patches), num_patches)[0]
        return any(all(length % tokens == 0 for length in run_lengths) for tokens in (full, short))

    def pruning_layers(self) -> tuple[int, int]:
        settings = self.config.vitcop_config
        return scaled_layers(len(self.language_model.layers), settings.merge_layer, settings.prune_layer)

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
        Encodes images, keeps the salient tokens of each and projects these (stage I).

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`).
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                The mean of this call over the layers of the language model, in place of
                `config.vitcop_config.budget`.

        Returns:
            Upstream's output, whose `pooler_output` is a list of `(n, hidden_size)` for each image. Where tokens were
            dropped it also has `keep_indices`, a list of `(n,)` ascending indices into upstream's T tokens,
            `num_placeholders`, T of each image, and `visual_groups`, what the language model needs of each token.

        Raises:
            `ValueError`: for an invalid budget or layer, or a tower that cannot give what the configuration asks for.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        settings, tower = self.config.vitcop_config, self.vision_tower
        patch_size, (height, width) = tower.config.patch_size, pixel_values.shape[-2:]
        rows, columns = height // patch_size, width // patch_size
        num_patches, num_images = rows * columns, len(pixel_values)
        budgets = requested_budgets(settings, num_visual_tokens, num_images, num_patches)
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
                f"image_sizes={image_sizes!r} are for towers without a fixed grid (Pixtral), which ViTCoP does not "
                "compress. Set vitcop_config.budget=None for them."
            )

        num_layers = tower.config.num_hidden_layers
        layers = [layer] if isinstance(layer, int) else layer
        layers = [resolve_layer(index, num_layers, "vision_feature_layer") for index in layers]
        salient_layer = resolve_layer(settings.layer, num_layers, "vitcop_config.layer")
        states = run_tower(tower, pixel_values, layers, cls_attention_layer=salient_layer, **kwargs)
        features = torch.cat([states.hidden_states[index] for index in layers], dim=-1)
        # CLS and register tokens come before the patches.
        num_prefix = features.shape[1] - num_patches
        grid = torch.cartesian_prod(torch.arange(rows) / rows, torch.arange(columns) / columns).to(features.device)

        kept, groups = [], []
        for image, budget in enumerate(budgets):
            count, num_centers = self._plan_tower(budget, num_patches)
            patches = select_salient(states.cls_attention[image, num_prefix:], count)
            keys = states.keys[image, num_prefix:][patches]
            clusters = cluster_tokens(keys, grid[patches], num_centers)
            counts = plan_counts(budget, count, len(self.language_model.layers), *self.pruning_layers())
            kept.append(patches + num_prefix)
            groups.append(describe_tokens(image, clusters, counts))
        image_features = self.multi_modal_projector(torch.cat([view[rows] for view, rows in zip(features, kept)]))

        dropped_by_upstream = 1 if strategy == "default" and num_prefix else 0
        outputs = states.outputs
        outputs.pooler_output = list(image_features.split([len(rows) for rows in kept]))
        outputs["keep_indices"] = [rows - dropped_by_upstream for rows in kept]
        outputs["num_placeholders"] = [features.shape[1] - dropped_by_upstream] * num_images
        outputs["visual_groups"] = groups
        return outputs

    def _plan_tower(self, budget: int, num_patches: int) -> tuple[int, int]:
        """How many tokens of an image stage I keeps, and how many cluster centres it takes."""
        if budget >= num_patches:
            return num_patches, num_patches
        settings = self.config.vitcop_config
        num_layers = len(self.language_model.layers)
        keep_share, center_share = default_shares(budget / num_patches, num_layers, *self.pruning_layers())
        keep_share = keep_share if settings.keep_share is None else settings.keep_share
        center_share = center_share if settings.center_share is None else settings.center_share
        count = count_of_share(keep_share, num_patches)
        if count < budget:
            raise ValueError(
                f"vitcop_config.keep_share={keep_share} keeps {count} of {num_patches} tokens, fewer than the mean of "
                f"{budget} that the budget asks for. Raise it, or lower the budget."
            )
        return count, count_of_share(center_share, count)

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
                The mean of this call over the layers of the language model, in place of
                `config.vitcop_config.budget`.
            visual_groups (`torch.LongTensor` of shape `(batch, columns, 4)`, *optional*):
                Made by `generate` and the head's `forward` for tokens that are dropped inside the language model.

        Raises:
            `ValueError`: if the prompt has neither T nor n placeholders for each image.
        """
        return self.forward_compressed(
            super().forward, num_visual_tokens=num_visual_tokens, visual_groups=visual_groups, **inputs
        )


class ViTCoPLlavaForConditionalGeneration(
    CoPrunedGenerationMixin, CompressedGenerationMixin, HubModelMixin, LlavaForConditionalGeneration, GenerationMixin
):
    """
    Modifications:
        - `forward` and `generate` shorten the prompt at their entrance, labels included.
        - the output of `forward` has the caller's columns, and `keep_mask`, which tells those that remain.
    """

    config: ViTCoPLlavaConfig
    config_class = ViTCoPLlavaConfig
    _auto_class = "AutoModelForImageTextToText"
    _auto_map = {
        "AutoModel": "ViTCoPLlavaAutoModel",
        "AutoModelForImageTextToText": "ViTCoPLlavaForConditionalGeneration",
        "AutoModelForMultimodalLM": "ViTCoPLlavaForConditionalGeneration",
    }
    _processor_class = ViTCoPLlavaProcessor

    def __init__(self, config: ViTCoPLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ViTCoPLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @like_upstream(LlavaForConditionalGeneration.get_image_features)
    def get_image_features(
        self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs
    ):
        """See [`ViTCoPLlavaModel.get_image_features`]."""
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
                The mean of this call over the layers of the language model, in place of
                `config.vitcop_config.budget`.
            visual_groups (`torch.LongTensor` of shape `(batch, columns, 4)`, *optional*):
                Made by `generate` for tokens that are dropped inside the language model.

        Returns:
            Upstream's output. Where the prompt was shortened it also has `keep_mask`, of shape `(batch, full_length)`:
            the columns of the caller's prompt that remain. A dropped column has the logits and hidden states of
            the last one before it that remains. Attentions and caches have the short length. It also has
            `layer_visual_tokens`, of shape `(batch, layers)`: how many visual tokens each layer saw. A column dropped
            inside the language model has the logits of the last column before it that is left.

        Raises:
            `ValueError`: if the prompt has neither T nor n placeholders for each image.
        """
        return self.forward_compressed(
            super().forward, num_visual_tokens=num_visual_tokens, visual_groups=visual_groups, **inputs
        )


class ViTCoPLlavaAutoModel(AutoModelMixin, ViTCoPLlavaModel):
    """See [`AutoModelMixin`]."""

    _base_class = ViTCoPLlavaModel
    _generating_class = ViTCoPLlavaForConditionalGeneration


# Stock checkpoints load by the stock conversions, which Transformers looks up by the name of the class.
for _ours, _stock in (("ViTCoPLlavaForConditionalGeneration", "llava"), ("ViTCoPLlavaModel", "LlavaModel")):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_stock), overwrite=True)
register_class_names(ViTCoPLlavaConfig.model_type, "ViTCoPLlavaForConditionalGeneration", "ViTCoPLlavaModel")

__all__ = ["ViTCoPLlavaAutoModel", "ViTCoPLlavaForConditionalGeneration", "ViTCoPLlavaModel"]
