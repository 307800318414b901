"""
Runs a vision tower no further than needed, and reads on the way what selection needs: the hidden states of a few
layers and, where wanted, the attention that the CLS token pays in one layer.
"""

import contextvars
import itertools
import threading
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


# How many layers an iteration over a tower's layers yields; None for all.
_num_layers_to_run: contextvars.ContextVar[int | None] = contextvars.ContextVar("num_layers_to_run", default=None)
# What towers call the embedding of their CLS token: CLIP, DINOv2.
_CLS_EMBEDDINGS = ("class_embedding", "cls_token")
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
        outputs: the tower's own output. Its last hidden state is that of the last layer that ran.
        hidden_states (`dict[int, torch.Tensor]`): `(batch, tokens, dim)` by index, 0 being the embeddings.
        cls_attention (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
            The attention weights of the CLS query, summed over the heads, in float32.
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`, *optional*):
            What the projections of that layer gave, the heads side by side.
    """

    outputs: Any = None
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    cls_attention: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None


def resolve_layer(layer: int, num_layers: int, name: str) -> int:
    """
    The non-negative index of a hidden state of a tower of `num_layers` layers, which has `num_layers + 1`.

    Raises:
        `ValueError`: if there is no such hidden state.
    """
    if not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(
            f"{name} must lie in [{-num_layers - 1}, {num_layers}] for a vision tower of {num_layers} layers, got "
            f"{layer}. The paper uses -2."
        )
    return layer % (num_layers + 1)


def run_tower(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    layers: Iterable[int],
    cls_attention_layer: int | None = None,
    **kwargs,
) -> TowerStates:
    """
    Args:
        tower (`nn.Module`): a vision tower of Transformers.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`).
        layers (`Iterable[int]`): the hidden states to return, as non-negative indices.
        cls_attention_layer (`int`, *optional*): the hidden state whose layer's CLS attention to return.
        kwargs: passed to the tower. Whoever asks for all hidden states or attentions gets a full run.

    Raises:
        `ValueError`: if CLS attention is asked of a tower without a CLS token, of the embeddings, or of a layer
            without query and key projections.
    """
    layers = set(layers)
    if torch.compiler.is_compiling() and cls_attention_layer is None:
        outputs = tower(pixel_values, return_dict=True, **{**kwargs, "output_hidden_states": True})
        return TowerStates(outputs, {layer: outputs.hidden_states[layer] for layer in layers})
    return _run_watched(tower, pixel_values, layers, cls_attention_layer, **kwargs)


@torch.compiler.disable  # compiled layers do not look for hooks again
def _run_watched(
    tower: nn.Module, pixel_values: torch.Tensor, layers: set[int], cls_attention_layer: int | None, **kwargs
) -> TowerStates:
    if cls_attention_layer is not None:
        _check_has_cls(tower)
    blocks = _find_layers(tower)
    states = TowerStates()
    wants_all = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    needed = max([*layers, cls_attention_layer or 0, 1])
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_capture(blocks, layer, states))
        if cls_attention_layer is not None:
            projections = stack.enter_context(_capture_projections(blocks, cls_attention_layer))
        if not wants_all:
            stack.enter_context(_stop_after(needed))
        states.outputs = tower(pixel_values, return_dict=True, **kwargs)
    if cls_attention_layer is not None:
        states.queries, states.keys = projections
        states.cls_attention = _cls_attention(*projections, num_heads=tower.config.num_attention_heads)
    return states


def _find_layers(tower: nn.Module) -> nn.ModuleList:
    num_layers = tower.config.num_hidden_layers
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            module.__class__ = _StoppableLayers
            return module
    raise ValueError(
        f"vision_tower of type {type(tower).__name__} has no list of its {num_layers} layers; PruneSID supports "
        "transformer towers such as CLIP, SigLIP and DINOv2."
    )


def _check_has_cls(tower: nn.Module) -> None:
    if not any(name.rsplit(".", 1)[-1] in _CLS_EMBEDDINGS for name, _ in tower.named_parameters()):
        raise ValueError(
            "ViTCoP, and prunesid_config.score='cls_attention', need a vision tower with a CLS token, which "
            f"{type(tower).__name__} has not. Use PruneSID with score='component'."
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
            "later layer, or use PruneSID with score='component'."
        )
    modules = dict(blocks[layer - 1].named_modules())
    by_suffix = {name.rsplit(".", 1)[-1]: module for name, module in modules.items()}
    names = next((pair for pair in _PROJECTIONS if all(name in by_suffix for name in pair)), None)
    if names is None:
        raise ValueError(
            f"ViTCoP, and prunesid_config.score='cls_attention', need separate query and key projections, which "
            f"{type(blocks[layer - 1]).__name__} has not. Use PruneSID with score='component'."
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
