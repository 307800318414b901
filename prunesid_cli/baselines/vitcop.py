"""ViTCoP, https://arxiv.org/abs/2601.17818, and PruneSID with `llm_budget`: both drop tokens inside the LLM as well.

They run the package's published code on the modules of the given model, and are measured in the mean over the layers
of the language model. S and D scale with its depth, V and p follow the budget (`default_shares`).

With PruneSID N + N // 2 tokens enter the language model, or all T if these are fewer, and are pruned inside to a
mean of N.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modeling_prunesid import (
    LayerPrunedLlavaConfig,
    LayerPrunedLlavaForConditionalGeneration,
    ViTCoPLlavaConfig,
    ViTCoPLlavaForConditionalGeneration,
)
from modeling_prunesid.checks import resolve_budget

from .encoder import running_as, stock_fields


@contextmanager
def vitcop(model: Any, budget: int | float) -> Iterator[list[float] | None]:
    """
    The context in which a model runs as ViTCoP's class. It yields a list that fills with the mean number of visual
    tokens of each image over the layers; None where nothing is dropped.
    """
    settings = {"budget": budget, "layer": model.config.prunesid_config.layer}
    config = ViTCoPLlavaConfig(**stock_fields(model.config), vitcop_config=settings)
    with running_as(ViTCoPLlavaForConditionalGeneration, config, model), _measured_inside(model, budget) as measured:
        yield measured


@contextmanager
def prunesid(model: Any, budget: int | float) -> Iterator[list[float] | None]:
    """The same for PruneSID with `nms_lambda="auto"` and `llm_budget`."""
    patches = _num_patches(model)
    count = resolve_budget(budget, patches)
    settings: dict[str, Any] = {"budget": None, "layer": model.config.prunesid_config.layer}
    if count < patches:
        settings |= {"budget": min(count + count // 2, patches), "llm_budget": count, "nms_lambda": "auto"}
    config = LayerPrunedLlavaConfig(**stock_fields(model.config), prunesid_config=settings)
    with (
        running_as(LayerPrunedLlavaForConditionalGeneration, config, model),
        _measured_inside(model, budget) as measured,
    ):
        yield measured


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
