"""
Watches a vision tower and a projector while upstream's own `get_image_features` runs: reads the hidden states of a few
layers, stops the tower after the last one that is needed, and lets only the kept tokens through the projector.
"""

import contextvars
import functools
import itertools
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .layers import find_layers


# How many layers an iteration over a tower's layers yields; None for all.
_num_layers_to_run: contextvars.ContextVar[int | None] = contextvars.ContextVar("num_layers_to_run", default=None)


class _StoppableLayers(nn.ModuleList):
    """A tower's own layers. While a limit is set in the current thread, a loop over them ends there."""

    def __iter__(self):
        layers = super().__iter__()
        if torch.compiler.is_compiling():
            return layers
        return itertools.islice(layers, _num_layers_to_run.get())


class _CapturedStates(dict):
    """The captured hidden states in place of a tower's own tuple of all of them: by index, negative ones as well."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.num_layers = num_layers

    def __getitem__(self, layer: int) -> torch.Tensor:
        return super().__getitem__(layer % (self.num_layers + 1))


@contextmanager
def watch_tower(tower: nn.Module, layers: Iterable[int], runs_whole: bool = False):
    """
    While upstream runs a tower, reads hidden states from it. The tower stops after the last layer that is needed, and
    its output has no other hidden states than these.

    Args:
        tower (`nn.Module`): a vision tower of Transformers.
        layers (`Iterable[int]`): the hidden states that anyone reads, as non-negative indices.
        runs_whole (`bool`): the caller asked upstream for all hidden states or attentions.

    Yields:
        `dict[int, torch.Tensor]`, which is filled with hidden states `(batch, tokens, dim)` by index, 0 being the
        embeddings, while the tower runs.
    """
    layers = set(layers)
    blocks, thread = layers_of(tower), threading.get_ident()
    blocks.__class__ = _StoppableLayers
    states = _CapturedStates(tower.config.num_hidden_layers)

    # While another thread takes its hooks away, PyTorch may call them without the keyword arguments.
    def ask_for_none(module, args, kwargs=None):
        if threading.get_ident() == thread:
            return args, {**kwargs, "output_hidden_states": False}

    def receive(module, args, output):
        if threading.get_ident() == thread:
            output["hidden_states"] = states

    with ExitStack() as stack:
        for layer in layers:
            block, receive_states = blocks[max(layer - 1, 0)], functools.partial(states.__setitem__, layer)
            stack.enter_context(hooked(block, receive_states, before=layer == 0))
        if not runs_whole:
            stack.callback(_num_layers_to_run.reset, _num_layers_to_run.set(max([*layers, 1])))
            stack.callback(tower.register_forward_pre_hook(ask_for_none, with_kwargs=True).remove)
            stack.callback(tower.register_forward_hook(receive).remove)
        yield states


@contextmanager
def project_rows(projector: nn.Module, choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.LongTensor]]):
    """
    While upstream runs a projector that maps every row for itself, gives it only some of the rows. Upstream gets zeros
    for the others, and goes on as if all were there.

    Args:
        projector (`nn.Module`): from `(views, tokens, dim)` to `(views, tokens, hidden_size)`.
        choose (`Callable`):
            From the projector's features to `(views, tokens + prefix, dim)` features, which may have a prefix in
            front of them, and the rows `(kept,)` of these, counted through, that are projected.

    Yields:
        `dict`, in which `"projected"` becomes `(views, tokens + prefix, hidden_size)`.
    """
    thread, result = threading.get_ident(), {}

    def restrict(module, args):
        if threading.get_ident() == thread and not result:
            result["shape"] = args[0].shape
            features, result["rows"] = choose(args[0])
            result["length"] = features.shape[:2]
            return (features.flatten(0, 1)[result["rows"]],)

    def spread(module, args, output):
        if threading.get_ident() == thread and "projected" not in result and "rows" in result:
            views, length = result["length"]
            whole = output.new_zeros(views * length, output.shape[-1])
            whole = whole.index_copy(0, result["rows"].to(output.device), output)
            result["projected"] = whole.view(views, length, -1)
            return result["projected"][:, length - result["shape"][1] :]

    handles = [projector.register_forward_pre_hook(restrict), projector.register_forward_hook(spread)]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()


def layers_of(tower: nn.Module) -> nn.ModuleList:
    """The list of a tower's layers. `ValueError` if it has none."""
    layers = find_layers(tower)
    if layers is None:
        raise ValueError(
            f"vision_tower of type {type(tower).__name__} has no list of its layers; PruneSID supports transformer "
            "towers such as CLIP, SigLIP and DINOv2."
        )
    return layers


@contextmanager
def hooked(module: nn.Module, receive, before: bool = False):
    """Calls `receive` with what `module` returns (or is first given) in this thread."""
    thread = threading.get_ident()

    def hook(module, args, output=None):
        if threading.get_ident() == thread:
            value = args[0] if before else output
            receive(value[0] if isinstance(value, tuple) else value)

    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
