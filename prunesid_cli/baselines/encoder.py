"""How methods encode images that look into the tower, at the pixels or at the question, and not at one finished view.

They run in LLaVA-1.5 alone. What chooses by one finished view is a method of the package's own seam, see `seam.py`.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid.checks import resolve_budget
from modeling_prunesid.layers import resolve_layer
from prunesid_cli.towers import run_tower


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


def patch_features(
    base_model: Any, pixel_values: torch.Tensor, layers: list[int], **tower_arguments: Any
) -> torch.Tensor:
    """What upstream projects of all patches of pictures: `(batch, T, dim)`, without CLS and register tokens."""
    states = run_tower(base_model.vision_tower, pixel_values, layers, **tower_arguments)
    features = torch.cat([states[layer] for layer in layers], dim=-1)
    return features[:, -num_patches(base_model.vision_tower, pixel_values) :]


def question_method(choose: Callable[..., torch.LongTensor]) -> Callable:
    """
    The context in which a model encodes its images for the question of their prompt.

    Args:
        choose:
            From an image's patches before and behind the projector, the embeddings `(words, hidden_size)` of the text
            behind the last image of its prompt, and N < T to the indices of the tokens kept.
    """

    @contextmanager
    def install(model: Any, budget: int | float) -> Iterator[None]:
        prompt: dict[str, torch.Tensor | None] = {"input_ids": None, "attention_mask": None}
        stock = model.generate

        def remember(pixel_values=None, input_ids=None, attention_mask=None, **others) -> None:
            comes = pixel_values is not None  # not with the tokens of an answer
            prompt.update(input_ids=input_ids if comes else None, attention_mask=attention_mask if comes else None)

        @functools.wraps(stock)
        def generate(inputs=None, **kwargs):
            remember(**{"input_ids": inputs, **kwargs})
            return stock(inputs, **kwargs)

        def encode(base_model: Any, pixel_values: torch.Tensor, layers: list[int], count: int) -> list[Kept]:
            words = _words_of_images(model, num_patches(base_model.vision_tower, pixel_values), **prompt)
            remember()  # another call brings its own prompt
            if len(words) != len(pixel_values):
                raise ValueError(
                    f"input_ids must hold the whole prompts of all {len(pixel_values)} images for a method that reads "
                    f"the question, got those of {len(words)}. Pass images and full prompts to generate or forward."
                )
            # A picture that several questions in a row are asked about goes through the tower once.
            is_new = [
                row == 0 or not torch.equal(pixel_values[row], pixel_values[row - 1]) for row in range(len(words))
            ]
            images = patch_features(base_model, pixel_values[torch.tensor(is_new)], layers)
            projected = [base_model.multi_modal_projector(image) for image in images]
            kept = []
            for number, question in zip((torch.tensor(is_new).cumsum(0) - 1).tolist(), words):
                indices = choose(images[number], projected[number], question, count)
                kept.append(Kept(images[number][indices], indices))
            return kept

        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: remember(**{"input_ids": args[0] if args else None, **kwargs}),
            with_kwargs=True,
        )
        try:
            with replaced(model, "generate", generate), encoder_method(encode)(model, budget):
                yield
        finally:
            handle.remove()

    return install


def _words_of_images(
    model: Any, patches: int, input_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """For each image of the prompts `(batch, length)`, the embeddings of the text behind the last one of its row."""
    words = []
    for row, ids in enumerate([] if input_ids is None else input_ids):
        is_image = ids == model.config.image_token_id
        is_text = (is_image.flip(0).cumsum(0) == 0).flip(0)
        if attention_mask is not None:
            is_text = is_text & attention_mask[row].bool()
        words += [model.get_input_embeddings()(ids[is_text])] * (int(is_image.sum()) // patches)
    return words


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
