"""
Video-LLaVA with PruneSID: tokens are chosen in each frame of a clip and in each image, and only these are projected.

Upstream feeds the CLS token of each frame to the language model, but not that of an image. What it feeds is kept,
within the budget: 17 tokens of a frame are its CLS token and 16 patches. Frame follows frame, the CLS token before its
patches, and these in raster order.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, VideoLlavaForConditionalGeneration, VideoLlavaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.video_llava.modeling_video_llava import (
    VideoLlavaMultiModalProjector,
    VideoLlavaPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .compression_prunesid import CompressedModelMixin
from .configuration_prunesid import PruneSIDVideoLlavaConfig
from .generation_prunesid import CompressedGenerationMixin
from .hub_prunesid import AutoModelMixin, HubModelMixin, register_class_names
from .processing_prunesid_video_llava import PruneSIDVideoLlavaProcessor
from .selection_prunesid import redundancy, resolve_budget
from .sharing_prunesid import SharedBudgets, choose_tokens_of_views, request_budgets
from .tower_prunesid import resolve_layer, run_tower
from .upstream_prunesid import VIDEO_LLAVA_PIXELS, like_upstream
from .views_prunesid import project_if_compared


class PruneSIDVideoLlavaModel(CompressedModelMixin, HubModelMixin, VideoLlavaModel):
    """
    Modifications:
        - `get_image_features` and `get_video_features` return the features of the kept tokens alone.
        - `forward` drops the placeholders of the other tokens from the prompt.
    """

    config: PruneSIDVideoLlavaConfig
    config_class = PruneSIDVideoLlavaConfig
    _auto_class = "AutoModel"
    _auto_map = {"AutoModel": "PruneSIDVideoLlavaModel"}

    def __init__(self, config: PruneSIDVideoLlavaConfig):
        VideoLlavaPreTrainedModel.__init__(self, config)
        self.video_tower = AutoModel.from_config(config.vision_config)
        self.image_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VideoLlavaMultiModalProjector(config)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        short = resolve_budget(self.config.prunesid_config.budget, patches)
        return any(all(length % tokens == 0 for length in run_lengths) for tokens in (patches, patches + 1, short))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_images: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes images, keeps N tokens of each and projects these.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`).
            pixel_values_images: the same, by its older name.
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`.

        Returns:
            Upstream's output. Where tokens were dropped, `pooler_output` is a list of `(N, hidden_size)` for each
            image, and there are `keep_indices`, a list of `(N,)` ascending indices into upstream's T tokens (-1 is a
            CLS token that upstream leaves out), and `num_placeholders`, T of each image.

        Raises:
            `ValueError`: for an invalid budget or layer, or a tower that cannot give what the configuration asks for.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        pixel_values = pixel_values_images if pixel_values is None else pixel_values
        is_fed_cls = strategy == "full"
        budgets = self._request_budgets(pixel_values[:, None], num_visual_tokens, is_fed_cls)
        if budgets is None:
            return super().get_image_features(
                **{VIDEO_LLAVA_PIXELS: pixel_values},
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                return_dict=True,
                **kwargs,
            )
        return self._encode(self.image_tower, pixel_values[:, None], layer, is_fed_cls, budgets, **kwargs)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes clips, keeps N tokens of each frame (with `budget_scope="image"`: of each clip) and projects these.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(num_clips, num_frames, channels, height, width)`).
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_clips,)`, *optional*):
                N of this call, in place of `config.prunesid_config.budget`. A list is one total for each clip.

        Returns:
            Upstream's output. Where tokens were dropped, `pooler_output` is a list of `(tokens, hidden_size)` for each
            clip, and there are `keep_indices`, a list of ascending indices into upstream's T tokens of the clip (those
            of a frame begin with its CLS token), and `num_placeholders`, T of each clip.

        Raises:
            `ValueError`: for an invalid budget or layer, or a tower that cannot give what the configuration asks for.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        budgets = self._request_budgets(pixel_values_videos, num_visual_tokens, is_fed_cls=True)
        if budgets is None:
            return super().get_video_features(
                pixel_values_videos=pixel_values_videos, vision_feature_layer=layer, return_dict=True, **kwargs
            )
        return self._encode(self.video_tower, pixel_values_videos, layer, True, budgets, **kwargs)

    def _request_budgets(self, pixels, num_visual_tokens, is_fed_cls: bool) -> SharedBudgets | None:
        """Budgets of inputs `(num_inputs, num_views, channels, height, width)`."""
        settings = self.config.prunesid_config
        num_tokens = self._num_patches(pixels) + is_fed_cls
        views = [[num_tokens] * pixels.shape[1]] * len(pixels)
        return request_budgets(settings, num_visual_tokens, views, num_tokens, int(is_fed_cls or settings.keep_cls))

    def _num_patches(self, pixels: torch.Tensor) -> int:
        height, width = pixels.shape[-2:]
        patch_size = self.config.vision_config.patch_size
        return (height // patch_size) * (width // patch_size)

    def _encode(
        self, tower: nn.Module, pixels: torch.Tensor, layer: int | list[int], is_fed_cls: bool, budgets, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encodes inputs `(num_inputs, num_views, channels, height, width)` and keeps what `budgets` allow."""
        settings, num_views = self.config.prunesid_config, pixels.shape[1]
        num_layers = tower.config.num_hidden_layers
        layers = [layer] if isinstance(layer, int) else layer
        layers = [resolve_layer(index, num_layers, "vision_feature_layer") for index in layers]
        selection_layer = resolve_layer(settings.layer, num_layers, "prunesid_config.layer")
        states = run_tower(
            tower,
            pixels.flatten(0, 1),
            [*layers, selection_layer],
            cls_attention_layer=selection_layer if settings.score == "cls_attention" else None,
            **kwargs,
        )

        features = torch.cat([states.hidden_states[index] for index in layers], dim=-1)
        num_patches = self._num_patches(pixels)
        if features.shape[1] != num_patches + 1:
            raise ValueError(
                f"vision_config.model_type={tower.config.model_type!r} gives {features.shape[1]} tokens for "
                f"{num_patches} patches. PruneSID for Video-LLaVA needs a tower with one CLS token, such as CLIP."
            )
        compared = states.hidden_states[selection_layer][:, 1:]
        attention = None if states.cls_attention is None else states.cls_attention[:, 1:]
        projected = project_if_compared(settings, self.multi_modal_projector, features[:, 1:])
        num_tokens, first_fed = num_patches + is_fed_cls, 0 if is_fed_cls else 1
        fed = torch.arange(first_fed, num_patches + 1, device=features.device)
        cls = torch.zeros(int(is_fed_cls or settings.keep_cls), dtype=torch.long, device=features.device)
        keep_indices, rows = [], []
        for index, total in enumerate(budgets.totals):
            views = slice(index * num_views, (index + 1) * num_views)
            if budgets.rule != "reference" and total == num_tokens * num_views:
                kept = [fed] * num_views
            else:
                selected = choose_tokens_of_views(
                    settings,
                    list(compared[views]),
                    [num_tokens] * num_views,
                    total,
                    budgets.rule,
                    num_tokens,
                    extra_kept=len(cls),
                    cls_attention=None if attention is None else list(attention[views]),
                    projected=None if projected is None else list(projected[views]),
                    information=frame_information(compared[views]) if budgets.rule == "information" else None,
                )
                kept = [torch.cat([cls, patches.to(cls.device) + 1]) for patches in selected]
            keep_indices.append(torch.cat([view * num_tokens + row - first_fed for view, row in enumerate(kept)]))
            rows.append(torch.cat([(views.start + view) * (num_patches + 1) + row for view, row in enumerate(kept)]))

        image_features = self.multi_modal_projector(features.flatten(0, 1)[torch.cat(rows)])
        outputs = states.outputs
        outputs.pooler_output = list(image_features.split([len(row) for row in rows]))
        outputs["keep_indices"] = keep_indices
        outputs["num_placeholders"] = [num_tokens * num_views] * len(rows)
        return outputs

    def encode_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As for every family; a list of totals may be for both modalities, first the images, then the clips."""
        counts, given = inputs.get("num_visual_tokens"), {name for name, value in inputs.items() if value is not None}
        names = given & {"pixel_values", "pixel_values_images"}
        is_list = isinstance(counts, (list, tuple)) or (isinstance(counts, torch.Tensor) and counts.dim() == 1)
        if not (is_list and names and "pixel_values_videos" in given):
            return super().encode_views(inputs)
        num_images = len(inputs[min(names)])
        of_images = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        of_clips = {name: value for name, value in inputs.items() if name not in names}
        encoded = super().encode_views({**of_images, "num_visual_tokens": counts[:num_images]})
        outputs = encoded["mm_encoder_outputs"]
        return super().encode_views(
            {**of_clips, "num_visual_tokens": counts[num_images:], "mm_encoder_outputs": outputs}
        )

    @like_upstream(VideoLlavaModel.forward)
    def forward(
        self,
        *,
        pixel_values: torch.Tensor | None = None,
        pixel_values_images: torch.Tensor | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **inputs,
    ):
        r"""
        Upstream's `forward` on the shortened prompt.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images + num_clips,)`,
                *optional*): N of this call, in place of `config.prunesid_config.budget`. A list is one total for each
                image and then for each clip.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image and clip.
        """
        return self.forward_compressed(
            self._forward_joined,
            **{VIDEO_LLAVA_PIXELS: pixel_values_images if pixel_values is None else pixel_values},
            num_visual_tokens=num_visual_tokens,
            **inputs,
        )

    def _forward_joined(self, mm_encoder_outputs=None, **inputs):
        """Upstream reads the features of a modality as one tensor: a row a view, or one row if they differ."""
        if mm_encoder_outputs is not None:
            mm_encoder_outputs = {modality: _join(output) for modality, output in mm_encoder_outputs.items()}
        return super().forward(mm_encoder_outputs=mm_encoder_outputs, **inputs)


class PruneSIDVideoLlavaForConditionalGeneration(
    CompressedGenerationMixin, HubModelMixin, VideoLlavaForConditionalGeneration, GenerationMixin
):
    """
    Modifications:
        - `forward` and `generate` shorten the prompt at their entrance, labels included.
        - the output of `forward` has the caller's columns, and `keep_mask`, which tells those that remain.
    """

    config: PruneSIDVideoLlavaConfig
    config_class = PruneSIDVideoLlavaConfig
    _auto_class = "AutoModelForImageTextToText"
    _auto_map = {
        "AutoModel": "PruneSIDVideoLlavaAutoModel",
        "AutoModelForImageTextToText": "PruneSIDVideoLlavaForConditionalGeneration",
        "AutoModelForMultimodalLM": "PruneSIDVideoLlavaForConditionalGeneration",
    }
    _processor_class = PruneSIDVideoLlavaProcessor

    def __init__(self, config: PruneSIDVideoLlavaConfig):
        VideoLlavaPreTrainedModel.__init__(self, config)
        self.model = PruneSIDVideoLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @like_upstream(VideoLlavaForConditionalGeneration.get_image_features)
    def get_image_features(
        self, *, num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None, **inputs
    ):
        """See [`PruneSIDVideoLlavaModel.get_image_features`]."""
        return self.model.get_image_features(num_visual_tokens=num_visual_tokens, **inputs)

    @like_upstream(VideoLlavaForConditionalGeneration.forward)
    def forward(
        self,
        *,
        pixel_values: torch.Tensor | None = None,
        pixel_values_images: torch.Tensor | None = None,
        num_visual_tokens: int | float | list[int] | torch.LongTensor | None = None,
        **inputs,
    ):
        r"""
        Upstream's `forward` on the shortened prompt; logits and hidden states have the caller's columns.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images + num_clips,)`,
                *optional*): N of this call, in place of `config.prunesid_config.budget`. A list is one total for each
                image and then for each clip.

        Returns:
            Upstream's output. Where the prompt was shortened it also has `keep_mask`, of shape `(batch, full_length)`:
            the columns of the caller's prompt that remain. A dropped column has the logits and hidden states of
            the last one before it that remains. Attentions and caches have the short length.

        Raises:
            `ValueError`: if the prompt has neither T nor N placeholders for each image and clip.
        """
        return self.forward_compressed(
            super().forward,
            **{VIDEO_LLAVA_PIXELS: pixel_values_images if pixel_values is None else pixel_values},
            num_visual_tokens=num_visual_tokens,
            **inputs,
        )


class PruneSIDVideoLlavaAutoModel(AutoModelMixin, PruneSIDVideoLlavaModel):
    """See [`AutoModelMixin`]."""

    _base_class = PruneSIDVideoLlavaModel
    _generating_class = PruneSIDVideoLlavaForConditionalGeneration


def frame_information(frames: torch.Tensor) -> list[float]:
    """
    What each frame of a clip shows: its information score 1 - rho (section 3.4), but no more than its change, the mean
    cosine distance of its patches to the same patches of the frame before. This is ours: a static frame has none.

    Args:
        frames (`torch.Tensor` of shape `(num_frames, patches, dim)`).
    """
    scores = 1 - redundancy(frames)
    directions = nn.functional.normalize(frames.float(), dim=-1)
    change = 1 - (directions[1:] * directions[:-1]).sum(-1).mean(-1)
    return [float(scores[0]), *torch.minimum(scores[1:], change.nan_to_num(0)).tolist()]


def _join(output: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
    if isinstance(output.pooler_output, torch.Tensor):
        return output
    views = list(output.pooler_output)
    joined = torch.stack(views) if len({len(view) for view in views}) == 1 else torch.cat(views)[None]
    return type(output)(**{**output, "pooler_output": joined})


# Stock checkpoints load by the stock conversions, which Transformers looks up by the name of the class.
for _ours, _stock in (
    ("PruneSIDVideoLlavaForConditionalGeneration", "video_llava"),
    ("PruneSIDVideoLlavaModel", "VideoLlavaModel"),
):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_stock), overwrite=True)
register_class_names(
    PruneSIDVideoLlavaConfig.model_type, "PruneSIDVideoLlavaForConditionalGeneration", "PruneSIDVideoLlavaModel"
)

__all__ = ["PruneSIDVideoLlavaAutoModel", "PruneSIDVideoLlavaForConditionalGeneration", "PruneSIDVideoLlavaModel"]
