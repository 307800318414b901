"""ViTCoP, https://arxiv.org/abs/2601.17818, and PruneSID with `llm_budget`: both drop tokens inside the LLM as well.

They run the package's published code on the modules of the given model, and are measured in the mean over the layers
of the language model. S and D scale with its depth, V and p follow the budget (`default_shares`).

With PruneSID N + N // 2 tokens enter the language model, or all T if these are fewer, and are thinned out inside to a
mean of N.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modeling_prunesid import PruneSIDConfig, ViTCoPLlavaConfig, ViTCoPLlavaModel
from modeling_prunesid.selection import resolve_budget

from .encoder import replaced


@contextmanager
def vitcop(model: Any, budget: int | float) -> Iterator[list[float] | None]:
    """
    The context in which a model runs as ViTCoP's class. It yields a list that fills with the mean number of visual
    tokens of each image over the layers; None where nothing is dropped.
    """
    own = model.model
    published = copy.copy(own)  # of the same modules
    published.__class__ = ViTCoPLlavaModel
    published.config = _vitcop_config(model.config, budget)
    model.model = published
    try:
        with _measured_inside(model, budget) as measured:
            yield measured
    finally:
        model.model = own


@contextmanager
def prunesid(model: Any, budget: int | float) -> Iterator[list[float] | None]:
    """The same for PruneSID with `nms_lambda="auto"` and `llm_budget`."""
    own, patches = model.config.prunesid_config, _num_patches(model)
    count = resolve_budget(budget, patches)
    settings = PruneSIDConfig(budget=None, layer=own.layer)
    if count < patches:
        entering = min(count + count // 2, patches)
        settings = PruneSIDConfig(budget=entering, llm_budget=count, nms_lambda="auto", layer=own.layer)
    with replaced(model.config, "prunesid_config", settings), _measured_inside(model, budget) as measured:
        yield measured


def _vitcop_config(config: Any, budget: int | float) -> ViTCoPLlavaConfig:
    fields = config.to_dict()
    fields = {name: fields[name] for name in fields if name not in ("prunesid_config", "model_type")}
    return ViTCoPLlavaConfig(**fields, vitcop_config={"budget": budget, "layer": config.prunesid_config.layer})


def _num_patches(model: Any) -> int:
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


@contextmanager
def _measured_inside(model: Any, budget: int | float) -> Iterator[list[float] | None]:
    if resolve_budget(budget, _num_patches(model)) >= _num_patches(model):
        yield None
        return
    measured: list[float] = []

    def receive(module, args, kwargs, output):
        if output.get("layer_visual_tokens") is None:
            return
        means = output["layer_visual_tokens"].float().mean(1).tolist()
        for mean, images in zip(means, kwargs["visual_groups"][..., 0]):
            count = len(images[images >= 0].unique())
            measured.extend(mean / count for _ in range(count))

    handle = model.model.register_forward_hook(receive, with_kwargs=True)
    try:
        yield measured
    finally:
        handle.remove()
