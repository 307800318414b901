"""The methods that PruneSID is compared with, our own implementations, run in one and the same model.

`METHODS` names them. `applied` makes a loaded model run with one of them, in `generate` and `forward`, for batches of
any size, and leaves the model as it was. Prompts are written in full, one placeholder for every patch.

    with applied(model, "visionzip", 64) as run:
        model.generate(**inputs)
    run.measured_tokens

Methods that compress before the language model are measured in the tokens that enter it. Each of its prompts is
shortened to them and numbered through, as PruneSID's are; the order of the tokens is stated by each method. Methods
that drop tokens inside the language model are measured in the mean over its layers.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from modeling_prunesid import PruneSIDConfig

from . import (
    dart,
    divprune,
    fastv,
    hired,
    mustdrop,
    prumerge,
    random_choice,
    sparsevlm,
    tome,
    uniform,
    visionzip,
    vitcop,
)
from .encoder import encoder_method, from_views, replaced
from .llm import llm_method


@dataclass(frozen=True)
class Method:
    """
    Args:
        title (`str`): the name in tables.
        place (`str`):
            Where tokens are dropped: `"nowhere"`, `"encoder"` (before the language model), `"llm"` or `"both"`.
        install: called with the model and the budget, a context in which the model runs with the method. It yields the
            list of what was measured, if this is not simply the tokens of the encoded images.
    """

    title: str
    place: str
    install: Callable[[Any, int | float], AbstractContextManager]


@dataclass
class Run:
    """What was measured: the visual tokens of each image, in order."""

    tokens: list[float] = field(default_factory=list)

    @property
    def measured_tokens(self) -> float:
        """Mean number of visual tokens of an image: in the language model's layers, or all that enter it."""
        return sum(self.tokens) / len(self.tokens)


@contextmanager
def applied(model: Any, name: str, budget: int | float) -> Iterator[Run]:
    """
    Inside, `model` runs with the method `name`; afterwards it is as it was.

    Args:
        model (`PruneSIDLlavaForConditionalGeneration`): with a tower that has a CLS token, such as CLIP or DINOv2.
        name (`str`): one of `METHODS`.
        budget (`int` or `float`): N, a count or a share of the patches of an image. From T on, nothing is dropped.

    Yields:
        `Run`: the tokens that were measured inside.

    Raises:
        `ValueError`: for an unknown name, another kind of model, or settings that a method cannot work with.
    """
    if name not in METHODS:
        raise ValueError(f"name must be one of {', '.join(METHODS)}, got {name!r}.")
    if type(model).__name__ != "PruneSIDLlavaForConditionalGeneration":  # a stock checkpoint keeps its model_type
        raise ValueError(
            f"model must be a PruneSIDLlavaForConditionalGeneration, got {type(model).__name__}. Load the checkpoint "
            "with that class; its weights are those of the stock LLaVA."
        )
    with METHODS[name].install(model, budget) as measured:
        if measured is not None:
            yield Run(measured)
            return
        run = Run()
        with _measured(model.model, run):
            yield run


@contextmanager
def _measured(base_model: Any, run: Run) -> Iterator[None]:
    encode = base_model.get_image_features

    @functools.wraps(encode)
    def get_image_features(*args, **kwargs):
        output = encode(*args, **kwargs)
        run.tokens += [float(len(view)) for view in output.pooler_output]
        return output

    with replaced(base_model, "get_image_features", get_image_features):
        yield


def _preset(**settings: Any) -> Callable:
    """PruneSID with `settings`, all others the paper's, in the layer that the model itself compares tokens by."""

    @contextmanager
    def install(model, budget):
        own = model.config.prunesid_config
        fixed = {"budget": budget, "layer": own.layer, "reference_information": own.reference_information}
        model.config.prunesid_config = PruneSIDConfig(**{**fixed, **settings})
        try:
            yield
        finally:
            model.config.prunesid_config = own

    return install


METHODS: dict[str, Method] = {
    "full": Method("Full", "nowhere", _preset(budget=None)),
    "random": Method("Random", "encoder", encoder_method(from_views(random_choice.choose))),
    "uniform": Method("Uniform", "encoder", encoder_method(from_views(uniform.choose))),
    "tome": Method("ToMe", "encoder", encoder_method(tome.encode)),
    "prumerge": Method("LLaVA-PruMerge", "encoder", encoder_method(from_views(prumerge.choose, "last"))),
    "prumerge+": Method("LLaVA-PruMerge+", "encoder", encoder_method(from_views(prumerge.choose_plus, "last"))),
    "hired": Method("HiRED", "encoder", encoder_method(from_views(hired.choose, "compared"))),
    "divprune": Method("DivPrune", "encoder", encoder_method(from_views(divprune.choose))),
    "visionzip": Method("VisionZip", "encoder", encoder_method(from_views(visionzip.choose, "compared"))),
    "visionzip-dyn": Method(
        "VisionZip-Dyn", "encoder", encoder_method(from_views(visionzip.choose_dynamic, "compared"))
    ),
    "fastv": Method("FastV", "llm", llm_method(fastv.plan, fastv.choose)),
    "dart": Method("DART", "llm", llm_method(dart.plan, dart.choose)),
    "sparsevlm": Method("SparseVLM", "llm", llm_method(sparsevlm.plan, sparsevlm.choose)),
    "mustdrop": Method(
        "MustDrop", "both", llm_method(mustdrop.plan, mustdrop.choose, encoder_method(mustdrop.encode))
    ),
    "vitcop": Method("ViTCoP", "both", vitcop.vitcop),
    "prunesid-paper": Method("PruneSID (paper)", "encoder", _preset()),
    "prunesid-release": Method("PruneSID (release)", "encoder", _preset(method="release")),
    "prunesid-spread": Method("PruneSID (spread)", "encoder", _preset(method="spread")),
    "prunesid-auto": Method("PruneSID (auto)", "encoder", _preset(nms_lambda="auto")),
    "prunesid-dyn": Method("PruneSID-Dyn", "encoder", _preset(dynamic=True)),
    "prunesid-llm": Method("PruneSID (auto), and inside", "both", vitcop.prunesid),
}

__all__ = ["METHODS", "Method", "Run", "applied"]
