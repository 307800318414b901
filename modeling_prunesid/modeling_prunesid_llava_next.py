"""
LLaVA-NeXT with PruneSID: tokens are chosen in each crop of an image, and only the kept ones are projected.

Kept tokens stay in upstream's order: those of the crop that shows the whole image, then those of the other crops in
the raster order of the whole image. Patches of padding, which upstream removes, take no part. The newline tokens,
which end the rows of a complete grid, leave with the first patch that is dropped: an image keeps all patches and
newline tokens, as upstream has them, or exactly its budget and no newline token.
"""

import math

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector, LlavaNextPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .anyres_prunesid import NEWLINE, PackedImage
from .compression_prunesid import CompressedModelMixin
from .configuration_prunesid import PruneSIDLlavaNextConfig
from .generation_prunesid import CompressedGenerationMixin
from .hub_prunesid import AutoModelMixin, HubModelMixin, register_class_names
from .processing_prunesid_llava_next import PruneSIDLlavaNextProcessor
from .selection_prunesid import resolve_budget
from .sharing_prunesid import choose_tokens_of_views, request_budgets
from .tower_prunesid import resolve_layer, run_tower
from .upstream_prunesid import like_upstream
from .views_prunesid import project_if_compared


class PruneSIDLlavaNextModel(CompressedModelMixin, HubModelMixin, LlavaNextModel):
    """
    Modifications:
        - `get_image_features` returns the features of the kept tokens alone, with their indices.
        - `forward` drops the placeholders of the other tokens from the prompt.
    """

    config: PruneSIDLlavaNextConfig
    config_class = PruneSIDLlavaNextConfig
    _auto_class = "AutoModel"
    _auto_map = {"AutoModel": "PruneSIDLlavaNextModel"}

    def __init__(self, config: PruneSIDLlavaNextConfig):
        LlavaNextPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        hidden_size = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(hidden_size, dtype=self.dtype) / math.sqrt(hidden_size))
        self.vocab_size = config.text_config.vocab_size
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        """An image has at least the tokens of the crop that shows the whole of it."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return min(run_lengths) >= resolve_budget(self.config.prunesid_config.budget, patches)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes images, keeps N tokens of each crop (with `budget_scope="image"`: of each image) and projects these.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, max_crops, channels, height, width)` or
                `(num_crops, channels, height, width)`).
            image_sizes (`torch.Tensor` of shape `(num_images, 2)`): height and width of each image, in pixels.
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`. A list is one total for each image.

        Returns:
            Upstream's output, whose `pooler_output` is a list of `(tokens, hidden_size)` for each image. Where tokens
            were dropped it also has `keep_indices`, a list of ascending indices into upstream's T tokens of each image
            (-1 for a CLS token, which upstream leaves out; those of the grid come before its patches), and
            `num_placeholders`, T of each image.

        Raises:
            `ValueError`: for an invalid budget or layer, or a tower that cannot give what the configuration asks for.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        settings, vision_config = self.config.prunesid_config, self.config.vision_config
        images = [
            PackedImage.from_size(
                size, self.config.image_grid_pinpoints, vision_config.image_size, vision_config.patch_size
            )
            for size in torch.as_tensor(image_sizes).tolist()
        ]
        patches_per_crop = (vision_config.image_size // vision_config.patch_size) ** 2
        extra_kept = int(settings.keep_cls)
        num_tokens = [[len(crop) for crop in image.crops] for image in images]
        budgets = request_budgets(settings, num_visual_tokens, num_tokens, patches_per_crop, extra_kept)
        if budgets is None:
            return super().get_image_features(
                pixel_values=pixel_values,
                image_sizes=image_sizes,
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                return_dict=True,
                **kwargs,
            )
        pixel_values = _join_crops(pixel_values, [len(image.crops) for image in images])
        num_layers = self.vision_tower.config.num_hidden_layers
        layers = [layer] if isinstance(layer, int) else layer
        layers = [resolve_layer(index, num_layers, "vision_feature_layer") for index in layers]
        selection_layer = resolve_layer(settings.layer, num_layers, "prunesid_config.layer")
        states = run_tower(
            self.vision_tower,
            pixel_values,
            [*layers, selection_layer],
            cls_attention_layer=selection_layer if settings.score == "cls_attention" else None,
            **kwargs,
        )

        features = torch.cat([states.hidden_states[index] for index in layers], dim=-1)
        num_prefix = features.shape[1] - patches_per_crop
        _check_prefix(num_prefix, strategy, settings.keep_cls)
        compared = states.hidden_states[selection_layer][:, num_prefix:]
        attention = None if states.cls_attention is None else states.cls_attention[:, num_prefix:]
        projected = project_if_compared(settings, self.multi_modal_projector, features[:, num_prefix:])
        keep_indices, rows, first = [], [], 0
        for image, total in zip(images, budgets.totals):
            crops = slice(first, first + len(image.crops))
            if budgets.rule != "reference" and total == sum(map(len, image.crops)):
                placeholders, tokens = image.keep(image.crops, num_prefix, keep_cls=False)
            else:
                shown = [crop.to(features.device) for crop in image.crops]
                selected = choose_tokens_of_views(
                    settings,
                    [view[patches] for view, patches in zip(compared[crops], shown)],
                    list(map(len, shown)),
                    total,
                    budgets.rule,
                    patches_per_crop,
                    extra_kept,
                    None if attention is None else [view[patches] for view, patches in zip(attention[crops], shown)],
                    None if projected is None else [view[patches] for view, patches in zip(projected[crops], shown)],
                )
                kept = [patches[chosen.cpu()] for patches, chosen in zip(image.crops, selected)]
                placeholders, tokens = image.keep(kept, num_prefix, settings.keep_cls)
            keep_indices.append(placeholders.to(features.device))
            rows.append(torch.where(tokens == NEWLINE, NEWLINE, tokens + first * features.shape[1]))
            first = crops.stop

        outputs = states.outputs
        outputs.pooler_output = list(self._project(features, torch.cat(rows)).split([len(row) for row in rows]))
        outputs["keep_indices"] = keep_indices
        outputs["num_placeholders"] = [len(image.placeholders) for image in images]
        return outputs

    def _project(self, features: torch.Tensor, rows: torch.LongTensor) -> torch.Tensor:
        """Projects the given rows of all crops' tokens; -1 stands for the newline token."""
        is_newline = (rows == NEWLINE).to(features.device)
        tokens = features.flatten(0, 1)[rows[rows != NEWLINE].to(features.device)]
        projected = self.multi_modal_projector(tokens)
        if len(projected) == len(rows):
            return projected
        packed = self.image_newline.to(projected).expand(len(rows), -1).clone()
        packed[~is_newline] = projected
        return packed

    @like_upstream(LlavaNextModel.forward)
    def forward(self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs):
        r"""
        Upstream's `forward` on the shortened prompt.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`. A list is one total for each image.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image.
        """
        return self.forward_compressed(super().forward, num_visual_tokens=num_visual_tokens, **inputs)


class PruneSIDLlavaNextForConditionalGeneration(
    CompressedGenerationMixin, HubModelMixin, LlavaNextForConditionalGeneration, GenerationMixin
):
    """
    Modifications:
        - `forward` and `generate` shorten the prompt at their entrance, labels included.
        - the output of `forward` has the caller's columns, and `keep_mask`, which tells those that remain.
    """

    config: PruneSIDLlavaNextConfig
    config_class = PruneSIDLlavaNextConfig
    _auto_class = "AutoModelForImageTextToText"
    _auto_map = {
        "AutoModel": "PruneSIDLlavaNextAutoModel",
        "AutoModelForImageTextToText": "PruneSIDLlavaNextForConditionalGeneration",
        "AutoModelForMultimodalLM": "PruneSIDLlavaNextForConditionalGeneration",
    }
    _processor_class = PruneSIDLlavaNextProcessor

    def __init__(self, config: PruneSIDLlavaNextConfig):
        LlavaNextPreTrainedModel.__init__(self, config)
        self.model = PruneSIDLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @like_upstream(LlavaNextForConditionalGeneration.get_image_features)
    def get_image_features(
        self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs
    ):
        """See [`PruneSIDLlavaNextModel.get_image_features`]."""
        return self.model.get_image_features(num_visual_tokens=num_visual_tokens, **inputs)

    @like_upstream(LlavaNextForConditionalGeneration.forward)
    def forward(self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs):
        r"""
        Upstream's `forward` on the shortened prompt; logits and hidden states have the caller's columns.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`. A list is one total for each image.

        Returns:
            Upstream's output. Where the prompt was shortened it also has `keep_mask`, of shape `(batch, full_length)`:
            the columns of the caller's prompt that remain. A dropped column has the logits and hidden states of
            the last one before it that remains. Attentions and caches have the short length.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image.
        """
        return self.forward_compressed(super().forward, num_visual_tokens=num_visual_tokens, **inputs)


class PruneSIDLlavaNextAutoModel(AutoModelMixin, PruneSIDLlavaNextModel):
    """See [`AutoModelMixin`]."""

    _base_class = PruneSIDLlavaNextModel
    _generating_class = PruneSIDLlavaNextForConditionalGeneration


def _join_crops(pixel_values: torch.Tensor, num_crops: list[int]) -> torch.Tensor:
    """All crops `(num_crops, channels, height, width)`, without those that only fill up a batch."""
    if pixel_values.dim() == 5 and len(pixel_values) == len(num_crops):
        return torch.cat([crops[:count] for crops, count in zip(pixel_values, num_crops)])
    if pixel_values.dim() == 4 and len(pixel_values) == sum(num_crops):
        return pixel_values
    raise ValueError(
        f"pixel_values of shape {tuple(pixel_values.shape)} do not fit the {len(num_crops)} image_sizes, which have "
        f"{num_crops} crops. Pass pixel_values and image_sizes as the processor returns them."
    )


def _check_prefix(num_prefix: int, strategy: str, keep_cls: bool) -> None:
    expected = 1 if strategy == "default" else 0
    if num_prefix != expected:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} leaves no whole grid of patches: the tower has {num_prefix} "
            f"tokens before its patches. Use 'default' for a tower with a CLS token, 'full' for one without."
        )
    if keep_cls and not num_prefix:
        raise ValueError("prunesid_config.keep_cls=True needs a vision tower with a CLS token. Set it to False.")


# Stock checkpoints load by the stock conversions, which Transformers looks up by the name of the class.
for _ours, _stock in (
    ("PruneSIDLlavaNextForConditionalGeneration", "llava_next"),
    ("PruneSIDLlavaNextModel", "LlavaNextModel"),
):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_stock), overwrite=True)
register_class_names(
    PruneSIDLlavaNextConfig.model_type, "PruneSIDLlavaNextForConditionalGeneration", "PruneSIDLlavaNextModel"
)

__all__ = ["PruneSIDLlavaNextAutoModel", "PruneSIDLlavaNextForConditionalGeneration", "PruneSIDLlavaNextModel"]
