"""
Drops tokens between the layers of a decoder, for any language model of Transformers and any rule of what to drop.

While a prompt runs through the decoder, a reducer in front of a layer shortens the hidden states; that layer and the
later ones get the matching rows of rotary embeddings and mask. Every token keeps its position. The first layer always
sees the whole prompt, so that the cache counts positions by it; later layers cache fewer columns, and which ones is
kept on the cache. At later steps the columns of the mask are chosen accordingly.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .cached_rows import follow_rows
from .upstream import CACHE_NAME, cache_of


@dataclass
class LayerInput:
    """
    What a reducer sees in front of a layer.

    Args:
        layer (`int`): index of the layer.
        hidden_states (`torch.Tensor` of shape `(batch, slots, hidden_size)`).
        columns (`torch.LongTensor` of shape `(batch, slots)`):
            Column of the prompt of each slot, ascending; -1 is padding, which comes first.
        keys (`torch.Tensor` of shape `(batch, slots, key_heads, head_dim)`):
            Keys of the layer before, as projected. Rotation changes no norm, nor that of the mean over heads.
        arguments (`dict`): what else the layer is called with, fitting these slots.
    """

    layer: int
    hidden_states: torch.Tensor
    columns: torch.LongTensor
    keys: torch.Tensor
    arguments: dict[str, Any]


# From a `LayerInput` to hidden states `(kept, hidden_size)` and the slots `(kept,)` of each row, ascending and without
# padding. Hidden states may change on the way (merged tokens).
Reducer = Callable[[LayerInput], tuple[list[torch.Tensor], list[torch.LongTensor]]]


@dataclass
class CachedColumns:
    """
    Which columns of the first layer's cache the later layers hold.

    Args:
        length (`int`): columns of the first layer's cache that this describes; later ones are in every layer.
        columns (`dict[int, torch.LongTensor]`):
            By the first layer of a run of layers, `(batch, slots)` columns in the order of these layers' caches; -1 is
            padding.
        padded (`set[int]`): the first layers of the runs of layers with padding.
    """

    length: int
    columns: dict[int, torch.LongTensor]
    padded: set[int]

    def remember(self, cache: Any) -> None:
        if cache is not None:
            cache._prunesid_columns = self
            follow_rows(cache)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take_rows(self, rows: torch.LongTensor) -> "CachedColumns":
        """The `rows`, known on the host."""
        columns = {
            layer: kept.index_select(0, rows.to(kept.device, non_blocking=True))
            for layer, kept in self.columns.items()
        }
        return CachedColumns(self.length, columns, self.padded)

    @staticmethod
    def are_known_of(cache: Any) -> bool:
        """Whether some layers of `cache` hold fewer columns than the first, or held them before it was emptied."""
        return getattr(cache, "_prunesid_columns", None) is not None

    @staticmethod
    def recall(cache: Any, batch: int) -> "CachedColumns | None":
        """
        What `cache` holds, for `batch` rows; it is forgotten where the cache was emptied. Beams repeat rows and
        reorder them among the copies of one prompt, which hold the same columns.
        """
        if not CachedColumns.are_known_of(cache):
            return None
        cached, length = cache._prunesid_columns, int(cache.get_seq_length())
        if not length:
            cache._prunesid_columns = None
            return None
        cached = cached._cropped_to(length)
        rows = len(cached)
        if not rows or batch % rows:
            raise ValueError(
                f"{CACHE_NAME} was filled by {rows} rows and is continued by {batch}; pass a multiple of its rows."
            )
        columns = {layer: kept.repeat_interleave(batch // rows, 0) for layer, kept in cached.columns.items()}
        return CachedColumns(cached.length, columns, cached.padded)

    def _cropped_to(self, length: int) -> "CachedColumns":
        """What is left when `crop` took the last columns of every layer, as assisted decoding does."""
        removed = self.length - length
        if removed <= 0:
            return self
        if any((kept[:, -removed:] < length).any() for kept in self.columns.values()):
            raise ValueError(
                f"{CACHE_NAME} was cropped to {length} columns, into the part of the prompt whose tokens were "
                "dropped inside the language model. Start from an empty cache."
            )
        columns = {layer: kept[:, :-removed] for layer, kept in self.columns.items()}
        return CachedColumns(length, columns, self.padded)

    def of_layer(self, layer: int) -> torch.LongTensor | None:
        return self.columns.get(_start_of(self.columns, layer))


def _start_of(columns: dict[int, torch.LongTensor], layer: int) -> int:
    """The first layer of the run of layers that `layer` is in; -1 where it has all columns."""
    return max((start for start in columns if start <= layer), default=-1)


@dataclass
class LayerPruning:
    """
    One run of a decoder. After it:

    Args:
        columns (`dict[int, torch.LongTensor]`):
            By the first layer of a run of layers, `(batch, slots)` columns of the prompt that these layers saw.
        padded (`set[int]`): the first layers of the runs of layers with padding.
    """

    decoder: nn.Module
    reducers: dict[int, Reducer]
    batch: int
    length: int
    past: int
    earlier: CachedColumns | None
    columns: dict[int, torch.LongTensor] = field(default_factory=dict)
    padded: set[int] = field(default_factory=set)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    # `(batch, length)`: the columns that are no padding; None for all.
    is_filled: torch.BoolTensor | None = None

    @property
    def is_flash(self) -> bool:
        return "flash" in (self.decoder.config._attn_implementation or "")

    def visual_tokens(self, is_visual: torch.BoolTensor) -> torch.LongTensor:
        """How many of the columns `is_visual` `(batch, length)` each layer saw: `(batch, layers)`."""
        counts, current = [], is_visual.sum(1)
        for layer in range(len(self.decoder.layers)):
            if layer in self.columns:
                columns = self.columns[layer].to(is_visual.device)
                current = (is_visual.gather(1, columns.clamp(min=0)) & (columns >= 0)).sum(1)
            counts.append(current)
        return torch.stack(counts, dim=1)

    def remember(self, cache: Any) -> None:
        """Keep on `cache` which columns its layers hold."""
        if not self.columns:
            return
        starts = {*self.columns, *(self.earlier.columns if self.earlier is not None else ())}
        columns = {start: self._cached_columns(start) for start in sorted(starts)}
        padded = {start for start in starts if self._is_padded(start)}
        CachedColumns(self.past + self.length, columns, padded).remember(cache)

    def _queries(self, layer: int) -> torch.LongTensor | None:
        """Columns of the prompt that run through a layer; None for all."""
        return self.columns.get(_start_of(self.columns, layer))

    def _is_padded(self, layer: int) -> bool:
        """Whether `_cached_columns` has padding."""
        runs = [self] if self.earlier is None else [self, self.earlier]
        return any(_start_of(run.columns, layer) in run.padded for run in runs)

    def _cached_columns(self, layer: int) -> torch.LongTensor | None:
        """Columns of the first layer's cache that a layer holds when it has seen this prompt; None for all."""
        queries = self._queries(layer)
        past = None if self.earlier is None else self.earlier.of_layer(layer)
        if queries is None and past is None:
            return None
        device = (queries if queries is not None else past).device
        described = 0 if past is None else self.earlier.length
        followed = torch.arange(described, self.past, device=device).expand(self.batch, -1)
        if queries is None:
            queries = torch.arange(self.length, device=device).expand(self.batch, -1)
        new = torch.where(queries < 0, -1, queries + self.past)
        return torch.cat([*([] if past is None else [past.to(device)]), followed, new], dim=1)

    def receive_keys(self, layer: int, args: tuple, keys: torch.Tensor) -> None:
        head_dim = self.decoder.layers[layer - 1].self_attn.head_dim
        self.keys[layer] = keys.unflatten(-1, (-1, head_dim))

    def before_layer(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a layer, shortened to the columns that are left."""
        hidden_states = args[0]
        if layer in self.reducers:
            hidden_states = self._reduce(layer, hidden_states, kwargs)
        if self._queries(layer) is None and (self.earlier is None or self.earlier.of_layer(layer) is None):
            return args, kwargs
        return (hidden_states, *args[1:]), self._fit_arguments(layer, kwargs)

    def _reduce(self, layer: int, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        columns = self._queries(layer)
        if columns is None:
            columns = torch.arange(self.length, device=hidden_states.device).expand(self.batch, -1)
        columns = columns.to(hidden_states.device)
        arguments = self._fit_arguments(layer, kwargs)
        keys = self.keys.pop(layer).to(hidden_states.device)
        states, slots = self.reducers[layer](LayerInput(layer, hidden_states, columns, keys, arguments))
        length = max(map(len, slots))
        if min(map(len, slots)) < length:
            self.padded.add(layer)
        states = [nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in states]
        slots = torch.stack([nn.functional.pad(row, (length - len(row), 0), value=-1) for row in slots])
        self.columns[layer] = columns.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
        return torch.stack(states)

    def _fit_arguments(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs, queries, cache = dict(kwargs), self._queries(layer), cache_of(kwargs)
        if queries is not None:
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = tuple(
                    _take(part, queries, -2) for part in kwargs["position_embeddings"]
                )
            if kwargs.get("position_ids") is not None:
                # FlashAttention takes gaps between positions for the ends of packed sequences.
                kwargs["position_ids"] = None if self.is_flash else _take(kwargs["position_ids"], queries, -1)
        cached = self._cached_columns(layer)
        if cached is not None and "attention_mask" in kwargs:
            num_queries = self.length if queries is None else queries.shape[1]
            length = cached.shape[1] if cache is None else cache.get_mask_sizes(num_queries, layer)[0]
            if kwargs["attention_mask"] is not None or self._is_padded(layer):
                mask = self._fit_mask(kwargs["attention_mask"], queries, cached, num_queries, length)
                kwargs["attention_mask"] = mask
        return kwargs

    def _fit_mask(
        self, mask: Any, queries: torch.LongTensor | None, cached: torch.LongTensor, num_queries: int, length: int
    ) -> torch.Tensor:
        """A layer's mask over the `length` slots of its cache, from that over the columns of the first layer."""
        is_token = cached >= 0
        if mask is None:
            if self.is_flash:
                return is_token
            slots = torch.arange(cached.shape[1], device=cached.device)
            is_past = slots <= slots[-num_queries:, None]
            fitted = (is_token[:, None] & is_past)[:, None]
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return mask.gather(1, cached.clamp(min=0).to(mask.device)) * is_token.to(mask.device)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 4:
            mask = mask.expand(self.batch, -1, -1, -1)
            if queries is not None:
                rows = queries.clamp(min=0).to(mask.device)[:, None, :, None]
                mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
            slots = cached.clamp(min=0).to(mask.device)[:, None, None].expand(-1, *mask.shape[1:3], -1)
            fitted = mask.gather(3, slots).masked_fill(~is_token.to(mask.device)[:, None, None], _masked(mask))
        else:
            raise ValueError(
                f"attn_implementation={self.decoder.config._attn_implementation!r} has a mask of type "
                f"{type(mask).__name__}, of which no columns can be dropped between layers. Load the model with "
                "attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
            )
        return nn.functional.pad(fitted, (0, length - fitted.shape[-1]), value=_masked(fitted))

    def after_last_layer(self, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Hidden states of the whole prompt again, so that logits and labels match it: a dropped column gets those of the
        last column before it that is left and no padding, which predicts what follows, or of the first where none is.
        """
        return self.in_prompt(hidden_states, len(self.decoder.layers) - 1)

    def in_prompt(self, hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
        """What `layer` returned, `(batch, slots, hidden_size)`, in the columns of the prompt."""
        columns = self._queries(layer)
        if columns is None:
            return hidden_states
        columns = columns.to(hidden_states.device)
        num_padding = (columns < 0).sum(1, keepdim=True)
        is_left = torch.zeros(self.batch, self.length + 1, dtype=torch.bool, device=columns.device)
        is_left = is_left.scatter(1, torch.where(columns < 0, self.length, columns), True)[:, :-1]
        slots = is_left.cumsum(1) - 1
        carries = is_left if self.is_filled is None else is_left & self.is_filled.to(columns.device)
        last = slots.masked_fill(~carries, -1).cummax(1).values
        first = slots.masked_fill(~carries, self.length).amin(1, keepdim=True)
        first = first.masked_fill(first == self.length, 0)
        slots = torch.where(is_left, slots, torch.where(last < 0, first, last)) + num_padding
        return hidden_states.gather(1, slots[..., None].expand(-1, -1, hidden_states.shape[-1]))


def _take(values: torch.Tensor, columns: torch.LongTensor, dim: int) -> torch.Tensor:
    """Columns along `dim`, in front of which is the batch (or a dimension of 1 in its place)."""
    columns = columns.clamp(min=0).to(values.device)
    values = values.expand(*values.shape[: dim - 1], len(columns), *values.shape[dim:])
    if dim == -2:
        columns = columns[..., None]
    return values.gather(dim, columns.expand(*values.shape[:dim], columns.shape[1], *values.shape[dim:][1:]))


def _masked(mask: torch.Tensor) -> bool | float:
    """What a mask has for columns that are not attended to."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def _check_decoder(decoder: nn.Module, reducers: dict[int, Reducer]) -> None:
    num_layers = len(decoder.layers)
    for layer in reducers:
        if not 1 <= layer < num_layers:
            raise ValueError(
                f"Tokens can be dropped in front of the layers 1 to {num_layers - 1} of a language model of "
                f"{num_layers} layers, got {layer}."
            )
        if not hasattr(decoder.layers[layer - 1].self_attn, "k_proj"):
            raise ValueError(
                f"Dropping tokens inside the language model needs separate key projections (self_attn.k_proj), which "
                f"{type(decoder).__name__} has not; drop them before it, with PruneSID alone."
            )
    window = getattr(decoder.config, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"text_config.sliding_window={window}: the window counts columns, which are fewer in later layers. Set it "
            "to None to drop tokens inside the language model."
        )
    if decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers):
        raise ValueError(
            "Dropping tokens inside the language model does not work with gradient checkpointing, which runs layers "
            "again. Switch checkpointing off, or drop tokens before the language model alone."
        )


@contextmanager
def prune_layers(decoder: nn.Module, hidden_states: torch.Tensor, cache: Any, reducers: dict[int, Reducer]):
    """
    Drops tokens between layers while a decoder runs on a prompt, and fits its masks at the steps that follow.

    Args:
        decoder (`nn.Module`): a language model of Transformers without its head, with `layers` and `config`.
        hidden_states (`torch.Tensor` of shape `(batch, length, ...)`): the prompt: embeddings, or ids.
        cache (`Cache`, *optional*): the cache that the decoder is given.
        reducers (`dict[int, Reducer]`): what to do in front of which layers, from 1; empty at later steps.

    Yields:
        `LayerPruning`: call its `remember` with the cache that the decoder returned.

    Raises:
        `ValueError`: for layers, attention implementations or caches that this does not work with.
    """
    batch, length = hidden_states.shape[:2]
    earlier = CachedColumns.recall(cache, batch)
    past = 0 if cache is None else int(cache.get_seq_length())
    pruning = LayerPruning(decoder, reducers, batch, length, past, earlier)
    if not reducers and earlier is None:
        yield pruning
        return
    _check_decoder(decoder, reducers)
    layers, first = decoder.layers, min([*reducers, *(earlier.columns if earlier is not None else ())])
    handles = [
        layers[layer - 1].self_attn.k_proj.register_forward_hook(_in_this_thread(pruning.receive_keys, layer))
        for layer in reducers
    ]
    for layer in range(first, len(layers)):
        hook = _in_this_thread(pruning.before_layer, layer)
        handles.append(layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
    handles.append(layers[-1].register_forward_hook(_in_this_thread(pruning.after_last_layer)))
    try:
        yield pruning
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked_output(module: nn.Module):
    """Yields a list that fills with what `module` returns."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(_in_this_thread(lambda args, output: outputs.append(output)))
    try:
        yield outputs
    finally:
        handle.remove()


def _in_this_thread(run: Callable, *first: Any) -> Callable:
    """A hook that leaves runs of the same module in other threads alone."""
    thread = threading.get_ident()

    def hook(module, *args):
        return run(*first, *args) if threading.get_ident() == thread else None

    return hook
