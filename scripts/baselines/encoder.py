"""Where methods that compress before the language model plug in: what they see of an image and what they return."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid.checks import resolve_budget
from modeling_prunesid.tower import resolve_layer, run_tower


@dataclass
class View:
    """
    One encoded image of T patches, in raster order.

    Args:
        pixels (`torch.Tensor` of shape `(channels, height, width)`).
        features (`torch.Tensor` of shape `(T, dim)`): what upstream projects, of `config.vision_feature_layer`.
        cls_feature (`torch.Tensor` of shape `(dim,)`): that of the CLS token.
        project (`Callable`): the projector, from `(..., dim)` to the width of the language model.
        compared (`torch.Tensor` of shape `(T, width)`): hidden states of `config.prunesid_config.layer`.
        reference_information (`float`, *optional*): `config.prunesid_config.reference_information`.
        num_heads (`int`): of the tower.
        cls_attention (`torch.Tensor` of shape `(T,)`, *optional*):
            Weights of the CLS token's attention in the layer that the method asked for, summed over the heads.
        queries, keys (`torch.Tensor` of shape `(P + T, width)`, *optional*):
            Projections of that layer, all heads joined, behind those of the P prefix tokens, of which CLS is first.
    """

    pixels: torch.Tensor
    features: torch.Tensor
    cls_feature: torch.Tensor
    project: Callable[[torch.Tensor], torch.Tensor]
    compared: torch.Tensor
    reference_information: float | None
    num_heads: int
    cls_attention: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @property
    def patch_keys(self) -> torch.Tensor:
        """`keys` of the patches, `(T, width)`."""
        return self.keys[-len(self.features) :]

    def keep(self, indices: torch.LongTensor) -> "Kept":
        return Kept(self.features[indices], indices)


class Kept(NamedTuple):
    """
    The tokens of one image that enter the language model.

    Args:
        features (`torch.Tensor` of shape `(N, dim)`): as the projector takes them, merged or not, in their order.
        indices (`torch.LongTensor` of shape `(N,)`): the patch that each stands for; -1 for a token without a place.
        is_key (`torch.BoolTensor` of shape `(N,)`, *optional*): tokens that are not to be dropped later.
    """

    features: torch.Tensor
    indices: torch.LongTensor
    is_key: torch.BoolTensor | None = None


def top(scores: torch.Tensor, count: int) -> torch.LongTensor:
    """The ascending indices of the `count` largest scores; of equal ones, the lower indices."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def from_views(choose: Callable[[View, int], Kept], attention: str | None = None) -> Callable:
    """
    The encoder of a method that looks at one finished image at a time.

    Args:
        choose: from a view and N < T to the tokens kept.
        attention (`str`, *optional*):
            The layer whose CLS attention, queries and keys the view has: `"compared"`, that of
            `config.prunesid_config.layer` (layer -2, methods' 22 of CLIP's 24 counted from 0), or `"last"` (23).
    """

    def encode(base_model: Any, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
        tower, settings = base_model.vision_tower, base_model.config.prunesid_config
        num_layers = tower.config.num_hidden_layers
        compared = resolve_layer(settings.layer, num_layers, "prunesid_config.layer")
        attention_layer = {None: None, "compared": compared, "last": num_layers}[attention]
        states = run_tower(tower, pixel_values, [*layers, compared], cls_attention_layer=attention_layer)
        features = torch.cat([states.hidden_states[layer] for layer in layers], dim=-1)
        num_prefix = features.shape[1] - num_patches(tower, pixel_values)
        kept = []
        for row, pixels in enumerate(pixel_values):
            view = View(
                pixels=pixels,
                features=features[row, num_prefix:],
                cls_feature=features[row, 0],
                project=base_model.multi_modal_projector,
                compared=states.hidden_states[compared][row, num_prefix:],
                reference_information=settings.reference_information,
                num_heads=tower.config.num_attention_heads,
            )
            if attention is not None:
                view.cls_attention = states.cls_attention[row, num_prefix:]
                view.queries, view.keys = states.queries[row], states.keys[row]
            kept.append(choose(view, budget))
        return kept

    return encode


def num_patches(tower: Any, pixel_values: torch.Tensor) -> int:
    height, width = pixel_values.shape[-2:]
    return (height // tower.config.patch_size) * (width // tower.config.patch_size)


def encoder_method(encode: Callable[[Any, torch.Tensor, list[int], int], list[Kept]]) -> Callable:
    """
    The context in which a model encodes its images by `encode`, which is called with the base model, the pixels, the
    non-negative indices of the feature layers and N < T, and returns the tokens of each image.
    """

    @contextmanager
    def install(model: Any, budget: int | float) -> Iterator[None]:
        base_model = model.model
        stock = base_model.get_image_features

        def get_image_features(
            pixel_values, vision_feature_layer=None, vision_feature_select_strategy=None, image_sizes=None, **kwargs
        ):
            config, tower = base_model.config, base_model.vision_tower
            layer = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
            strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
            if strategy != "default":
                raise ValueError(
                    f"vision_feature_select_strategy must be 'default', for which the methods are defined, got "
                    f"{strategy!r}."
                )
            patches = num_patches(tower, pixel_values)
            count = resolve_budget(budget, patches)
            if count == patches:
                return stock(pixel_values, layer, strategy, image_sizes, num_visual_tokens=patches, return_dict=True)
            layers = [layer] if isinstance(layer, int) else layer
            layers = [resolve_layer(index, tower.config.num_hidden_layers, "vision_feature_layer") for index in layers]
            kept = encode(base_model, pixel_values, layers, count)
            features = base_model.multi_modal_projector(torch.cat([tokens.features for tokens in kept]))
            output = BaseModelOutputWithPooling(
                pooler_output=list(features.split([len(tokens.indices) for tokens in kept]))
            )
            output["keep_indices"] = [tokens.indices for tokens in kept]
            output["num_placeholders"] = [patches] * len(kept)
            if kept[0].is_key is not None:
                output["is_key"] = [tokens.is_key for tokens in kept]
            return output

        with replaced(base_model, "get_image_features", get_image_features):
            yield

    return install


@contextmanager
def replaced(instance: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one instance, replaced; afterwards the instance has what it had, or its class's again."""
    missing = object()
    before = vars(instance).get(name, missing)
    setattr(instance, name, value)
    try:
        yield
    finally:
        delattr(instance, name)
        if before is not missing:
            setattr(instance, name, before)


@contextmanager
def running_as(head_class: Any, config: Any, model: Any) -> Iterator[None]:
    """Inside, `model` is of another class with a language-modelling head, around the same modules."""
    own, own_class = model.model, type(model)
    published = copy.copy(own)  # of the same modules
    published.__class__, published.config = head_class.model_class, config
    model.model, model.__class__ = published, head_class
    try:
        yield
    finally:
        model.model, model.__class__ = own, own_class


def stock_fields(config: Any) -> dict[str, Any]:
    """The fields of the stock configuration, for one of another class."""
    return {name: value for name, value in config.to_dict().items() if name not in ("prunesid_config", "model_type")}
