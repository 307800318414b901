"""The methods that PruneSID is compared with, our own implementations, run in one and the same model.

`METHODS` names them. `applied` makes a loaded model run with one of them, in `generate` and `forward`, for batches of
any size, and leaves the model as it was. Prompts are written in full, one placeholder for every patch. Methods that
choose by one finished view (`seam.py`) run in every family that has what they need, the others in LLaVA-1.5.

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
from types import ModuleType
from typing import Any

from . import (
    cdpruner,
    dart,
    divprune,
    downsample,
    dpp,
    fastv,
    hiprune,
    hired,
    mustdrop,
    prumerge,
    random_choice,
    sparsevlm,
    tome,
    uniform,
    visionzip,
    vispruner,
    vitcop,
)
from .asked import asking
from .encoder import encoder_method, question_method, replaced
from .llm import llm_method
from .seam import preset


@dataclass(frozen=True)
class Method:
    """
    Args:
        title (`str`): the name in tables.
        place (`str`):
            Where tokens are dropped: `"nowhere"`, `"encoder"` (before the language model), `"llm"` or `"both"`.
        install: called with the model and the budget, a context in which the model runs with the method. It yields the
            list of what was measured, if this is not simply the tokens of the encoded images.
        reads_question (`bool`): whether the tokens of an image depend on its prompt.
        any_family (`bool`): whether it is a method of the package's seam, which any family runs.
    """

    title: str
    place: str
    install: Callable[[Any, int | float], AbstractContextManager]
    reads_question: bool = False
    any_family: bool = False


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
        model: a model of a PruneSID family; for methods that do not choose by one finished view a
            `PruneSIDLlavaForConditionalGeneration` with a tower that has a CLS token, such as CLIP or DINOv2.
        name (`str`): one of `METHODS`.
        budget (`int` or `float`): N, a count or a share of the patches of a view. From T on, nothing is dropped.

    Yields:
        `Run`: the tokens that were measured inside.

    Raises:
        `ValueError`: for an unknown name, another kind of model, or one that lacks what a method reads.
    """
    if name not in METHODS:
        raise ValueError(f"name must be one of {', '.join(METHODS)}, got {name!r}.")
    own_class, settings = type(model).__name__, getattr(model.config, "prunesid_config", None)
    if type(settings).__name__ != "PruneSIDConfig":
        raise ValueError(
            f"model must be of a PruneSID family, such as PruneSIDLlavaForConditionalGeneration, got {own_class}. "
            "Load the checkpoint with its family's class; the weights are those of the stock model."
        )
    if not METHODS[name].any_family and own_class != "PruneSIDLlavaForConditionalGeneration":
        raise ValueError(
            f"model must be a PruneSIDLlavaForConditionalGeneration for {name!r}, which looks into the tower or the "
            f"language model, got {own_class}. Take a method that chooses by one finished view, such as 'divprune'."
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
        run.tokens += [float(len(view)) for view in base_model.features_of(output)]
        return output

    with replaced(base_model, "get_image_features", get_image_features):
        yield


def _seam(title: str, module: ModuleType | None = None, place: str = "encoder", **settings: Any) -> Method:
    return Method(title, place, preset(module, **settings), any_family=True)


def _asking(title: str, **settings: Any) -> Method:
    install = asking(preset(**settings, method_settings={"question": True}))
    return Method(title, "encoder", install, reads_question=True, any_family=True)


METHODS: dict[str, Method] = {
    "full": _seam("Full", place="nowhere", budget=None),
    "random": _seam("Random", random_choice),
    "uniform": _seam("Uniform", uniform),
    "tome": Method("ToMe", "encoder", encoder_method(tome.encode)),
    "prumerge": _seam("LLaVA-PruMerge", prumerge, layer=-1),
    "prumerge+": _seam("LLaVA-PruMerge+", prumerge, layer=-1, method_settings={"strided": True}),
    "hired": _seam("HiRED", hired),
    "divprune": _seam("DivPrune", divprune),
    "visionzip": _seam("VisionZip", visionzip),
    "visionzip-dyn": _seam("VisionZip-Dyn", visionzip, dynamic=True, min_budget=2),
    "dpp": _seam("DPP", dpp),
    "vispruner": _seam("VisPruner", vispruner),
    "hiprune": Method("HiPrune", "encoder", encoder_method(hiprune.encode)),
    "cdpruner": Method("CDPruner", "encoder", question_method(cdpruner.choose), reads_question=True),
    "downsample-image": Method("Smaller picture", "encoder", encoder_method(downsample.encode_small)),
    "downsample-features": Method("Averaged features", "encoder", encoder_method(downsample.encode_cells)),
    "downsample-enlarged": Method(
        "Smaller picture, enlarged again", "nowhere", encoder_method(downsample.encode_enlarged)
    ),
    "fastv": Method("FastV", "llm", llm_method(fastv.plan, fastv.choose)),
    "dart": Method("DART", "llm", llm_method(dart.plan, dart.choose)),
    "sparsevlm-v1.5": Method("SparseVLM v1.5", "llm", llm_method(sparsevlm.plan, sparsevlm.choose)),
    "mustdrop": Method(
        "MustDrop", "both", llm_method(mustdrop.plan, mustdrop.choose, encoder_method(mustdrop.encode))
    ),
    "vitcop": Method("ViTCoP", "both", vitcop.vitcop),
    "prunesid-paper": _seam("PruneSID (paper)"),
    "prunesid-release": _seam("PruneSID (release)", method="release"),
    "prunesid-spread": _seam("PruneSID (spread)", method="spread"),
    "prunesid-question": _asking("PruneSID (spread, by the question)", method="spread"),
    "prunesid-auto-question": _asking("PruneSID (auto, by the question)", nms_lambda="auto"),
    "prunesid-release-question": _asking("PruneSID (release, by the question)", method="release"),
    "prunesid-auto": _seam("PruneSID (auto)", nms_lambda="auto"),
    "prunesid-dyn": _seam("PruneSID-Dyn", dynamic=True),
    "prunesid-llm": Method("PruneSID (auto), and inside", "both", vitcop.prunesid),
}

__all__ = ["METHODS", "Method", "Run", "applied"]
