"""
The attention that each token of a vision tower receives in one layer, read while upstream's own encoder runs.

Upstream's attention modules hand queries and keys to a function that they look up by a name in their configuration.
While a layer is watched, its module has a copy of the configuration with the name of a function that reads them and
passes them on. So they are read as they are attended (of fused projections, normalized, rotated), sequence by
sequence, and a matrix of tokens x tokens is never formed.
"""

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .layers import count_prefix, find_layers, resolve_layer
from .patches import pool_blocks, tower_of


# Each copy of this file, of the package and of every repository, has a function of its own.
_NAME = f"prunesid_read_{abs(hash(__name__))}"
_LOGITS_AT_ONCE = 2**24

# The module that the current thread watches, and where what it receives goes.
_reader: ContextVar[tuple[nn.Module, list] | None] = ContextVar("reader", default=None)
# Watched modules: their own configuration, and how many threads watch them.
_watched: dict[nn.Module, list] = {}
_lock = threading.Lock()


@torch.no_grad()
def received_attention(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The mean attention that each key receives, over all heads and queries.

    Args:
        queries (`torch.Tensor` of shape `(batch, heads, tokens, dim)`).
        keys (`torch.Tensor` of shape `(batch, key_heads, tokens, dim)`): of as many heads, or of groups of them.
        scaling (`float`, *optional*): of the logits; by default `dim ** -0.5`.
        mask (`torch.Tensor`, *optional*): true where a query attends, or added to the logits.

    Returns:
        `torch.Tensor` of shape `(batch, tokens)`, of sum 1: in float32, or float64 for float64.
    """
    batch, heads, tokens, dim = queries.shape
    dtype = torch.promote_types(queries.dtype, torch.float32)
    keys = keys.to(dtype).repeat_interleave(heads // keys.shape[1], 1).transpose(-1, -2)
    scaling = dim**-0.5 if scaling is None else scaling
    received = queries.new_zeros(batch, keys.shape[-1], dtype=dtype)
    at_once = max(_LOGITS_AT_ONCE // (batch * heads * keys.shape[-1]), 1)
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, tokens, at_once):
            logits = queries[:, :, start : start + at_once].to(dtype) @ keys * scaling
            if mask is not None:
                part = mask if mask.shape[-2] == 1 else mask[..., start : start + at_once, :]
                logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
            received += logits.softmax(-1).sum((1, 2))
    return received / (heads * tokens)


def _read(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """An attention function of Transformers: it reads what the current thread watches, and calls the module's own."""
    reader = _reader.get()
    if reader is not None and reader[0] is module:
        reader[1].append(received_attention(query, key, scaling, attention_mask))
    config = _watched.get(module, [module.config])[0]
    functions = vars(sys.modules[type(module).__module__])
    eager = functions.get("vision_eager_attention_forward") or functions["eager_attention_forward"]  # Llama 4's own
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(_NAME, _read)


def _attention_of(layer: nn.Module) -> nn.Module | None:
    """The module of a layer that calls one of Transformers' attention functions."""
    for module in layer.modules():
        has_name = getattr(getattr(module, "config", None), "_attn_implementation", None) is not None
        if "Attention" in type(module).__name__ and has_name:
            return module
    return None


def attending_layer(tower: nn.Module, layer: int) -> nn.Module:
    """
    The layer of a tower that gives the hidden states of an index.

    Args:
        tower (`nn.Module`): a vision tower of Transformers.
        layer (`int`): `prunesid_config.layer`.

    Raises:
        `ValueError`: for a layer whose attention cannot be read, or is within windows, with the nearest that is fit.
    """
    layers: Any = find_layers(tower) or []
    whole = getattr(tower.config, "fullatt_block_indexes", range(len(layers)))
    fit = [place + 1 for place in whole if _attention_of(layers[place]) is not None]
    if not fit:
        raise ValueError(
            f"score='attention' needs a vision tower that calls Transformers' attention functions, which "
            f"{type(tower).__name__} does not. Use score='component'."
        )
    index = resolve_layer(layer, len(layers), "prunesid_config.layer")
    if index not in fit:
        nearest = min(fit, key=lambda place: abs(place - index))
        raise ValueError(
            f"prunesid_config.layer={layer} does not attend from each token to the whole image, so that score="
            f"'attention' cannot rank by it. The nearest layer that does is {nearest}. Set layer={nearest}."
        )
    return layers[index - 1]


@contextmanager
def watch_attention(layer: nn.Module):
    """
    While upstream runs a layer of a tower, reads the attention that its tokens receive.

    Args:
        layer (`nn.Module`): of [`attending_layer`].

    Yields:
        `list[torch.Tensor]`, which is filled with `(batch, tokens)` of each call of the attention function: one for
        all views, or one for each sequence of a packed batch.

    """
    module, received = _attention_of(layer), []
    with _lock:
        own, count = _watched.get(module, (module.config, 0))
        _watched[module] = [own, count + 1]
        if not count:
            module.config = copy.copy(own)
            module.config._attn_implementation_internal = _NAME
    token = _reader.set((module, received))
    try:
        yield received
    finally:
        _reader.reset(token)
        with _lock:
            own, count = _watched.pop(module)
            if count > 1:
                _watched[module] = [own, count - 1]
            else:
                module.config = own


@torch.compiler.disable
def encode_with_attention(
    model: Any, modality: str, encode: Callable, inputs: dict[str, Any]
) -> tuple[Any, torch.Tensor]:
    """
    Runs upstream's encoder.

    Args:
        model: a [`PrunedModelMixin`] whose tokens are compared as they enter the language model.
        modality (`str`), encode (`Callable`), inputs (`dict`): upstream's encoder, and what it is called with.

    Returns:
        Upstream's output, and the attention `(patches,)` that the patches of all inputs receive in the layer of the
        settings, in the tower's order, without CLS tokens and registers.

    Raises:
        `ValueError`: for a layer that `attending_layer` refuses.
    """
    with watch_attention(attending_layer(tower_of(model), model.config.prunesid_config.layer)) as received:
        output = encode(**inputs)
    return output, torch.cat([model.patches_of(part).flatten() for part in received])


# What the model's code reads attention by; a repository whose method reads none goes without this file.
PARTS = SimpleNamespace(
    attending_layer=attending_layer,
    watch=watch_attention,
    encode=encode_with_attention,
    num_prefix=lambda model: count_prefix(tower_of(model)),
    pool=pool_blocks,
)
