"""
Watches a vision tower and a projector while upstream's own `get_image_features` runs: reads the hidden states of a few
layers and, where a method asks for it, the attention that the CLS token pays in one layer; stops the tower after the
last layer that is needed; and lets only the kept tokens through the projector.
"""

import contextvars
import itertools
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .layers import find_layers, has_cls


# How many layers an iteration over a tower's layers yields; None for all.
_num_layers_to_run: contextvars.ContextVar[int | None] = contextvars.ContextVar("num_layers_to_run", default=None)
_INSTEAD = "Use PruneSID with method='paper', or method_settings={'score': 'component'}."
# What attention modules call their query and key projections: CLIP and SigLIP, DINOv2.
_PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"))


class _StoppableLayers(nn.ModuleList):
    """A tower's own layers. While a limit is set in the current thread, a loop over them ends there."""

    def __iter__(self):
        layers = super().__iter__()
        if torch.compiler.is_compiling():
            return layers
        return itertools.islice(layers, _num_layers_to_run.get())


@dataclass
class TowerStates:
    """
    Args:
        hidden_states (`dict[int, torch.Tensor]`): `(batch, tokens, dim)` by index, 0 being the embeddings.
        cls_attention (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
            The attention weights of the CLS query, summed over the heads, in float32.
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`, *optional*):
            What the projections of that layer gave, the heads side by side.
    """

    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    cls_attention: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @property
    def joined_attention(self) -> torch.Tensor:
        """The attention weights `(batch, tokens)` of the CLS query with all heads taken as one, in float32."""
        return _cls_attention(self.queries, self.keys, num_heads=1)


class _CapturedStates(dict):
    """The captured hidden states in place of a tower's own tuple of all of them: by index, negative ones as well."""

    def __init__(self, states: dict[int, torch.Tensor], num_layers: int):
        super().__init__(states)
        self.num_layers = num_layers

    def __getitem__(self, layer: int) -> torch.Tensor:
        return super().__getitem__(layer % (self.num_layers + 1))


@contextmanager
def watch_tower(
    tower: nn.Module, layers: Iterable[int], cls_attention_layer: int | None = None, runs_whole: bool = False
):
    """
    While upstream runs a tower, reads hidden states and attention from it. The tower stops after the last layer that
    is needed, and its output has no other hidden states than these.

    Args:
        tower (`nn.Module`): a vision tower of Transformers.
        layers (`Iterable[int]`): the hidden states that anyone reads, as non-negative indices.
        cls_attention_layer (`int`, *optional*): the hidden state whose layer's CLS attention to read.
        runs_whole (`bool`): the caller asked upstream for all hidden states or attentions.

    Yields:
        [`TowerStates`], which is filled when the tower has run.

    Raises:
        `ValueError`: if CLS attention is asked of a tower without a CLS token, of the embeddings, or of a layer
            without query and key projections.
    """
    layers = set(layers)
    if cls_attention_layer is not None:
        check_has_cls(tower)
    blocks, states, thread = layers_of(tower), TowerStates(), threading.get_ident()
    blocks.__class__ = _StoppableLayers
    projections: list[torch.Tensor] = []

    # While another thread takes its hooks away, PyTorch may call them without the keyword arguments.
    def ask_for_none(module, args, kwargs=None):
        if threading.get_ident() == thread:
            return args, {**kwargs, "output_hidden_states": False}

    def receive(module, args, output):
        if threading.get_ident() == thread:
            if projections:
                states.queries, states.keys = projections
                states.cls_attention = _cls_attention(*projections, num_heads=tower.config.num_attention_heads)
            if not runs_whole:
                output["hidden_states"] = _CapturedStates(states.hidden_states, tower.config.num_hidden_layers)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_capture(blocks, layer, states))
        if cls_attention_layer is not None:
            projections = stack.enter_context(_capture_projections(blocks, cls_attention_layer))
        if not runs_whole:
            stack.enter_context(_stop_after(max([*layers, cls_attention_layer or 0, 1])))
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


def check_has_cls(tower: nn.Module) -> None:
    if not has_cls(tower):
        raise ValueError(
            "ViTCoP, and methods that rank tokens by CLS attention, need a vision tower with a CLS token, which "
            f"{type(tower).__name__} lacks. {_INSTEAD}"
        )


@contextmanager
def _stop_after(num_layers: int):
    token = _num_layers_to_run.set(num_layers)
    try:
        yield
    finally:
        _num_layers_to_run.reset(token)


@contextmanager
def _hooked(module: nn.Module, receive, before: bool = False):
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


def _capture(blocks: nn.ModuleList, layer: int, states: TowerStates):
    def receive(value):
        states.hidden_states[layer] = value

    return _hooked(blocks[max(layer - 1, 0)], receive, before=layer == 0)


@contextmanager
def _capture_projections(blocks: nn.ModuleList, layer: int):
    if layer == 0:
        raise ValueError(
            "prunesid_config.layer=0 (or vitcop_config.layer=0) are the embeddings, which have no attention. Name a "
            "later layer. " + _INSTEAD
        )
    modules = dict(blocks[layer - 1].named_modules())
    by_suffix = {name.rsplit(".", 1)[-1]: module for name, module in modules.items()}
    names = next((pair for pair in _PROJECTIONS if all(name in by_suffix for name in pair)), None)
    if names is None:
        raise ValueError(
            "ViTCoP, and methods that rank tokens by CLS attention, need separate query and key projections, which "
            f"{type(blocks[layer - 1]).__name__} lacks. {_INSTEAD}"
        )
    captured: list[torch.Tensor] = []
    with _hooked(by_suffix[names[0]], captured.append), _hooked(by_suffix[names[1]], captured.append):
        yield captured


def _cls_attention(queries: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Softmax of the first query over all keys `(batch, tokens, dim)`, summed over the heads: `(batch, tokens)`."""
    batch, tokens, dim = keys.shape
    query = queries[:, :1].reshape(batch, 1, num_heads, -1).transpose(1, 2)
    keys = keys.reshape(batch, tokens, num_heads, -1).transpose(1, 2)
    with torch.autocast(queries.device.type, enabled=False):
        logits = query @ keys.transpose(-1, -2) * (dim // num_heads) ** -0.5
        return logits.float().softmax(-1).sum((1, 2))
