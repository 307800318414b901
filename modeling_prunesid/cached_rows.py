"""
Which rows of a cache are which: what is remembered of a prompt follows the rows that a caller reorders, repeats or
selects (`cache.reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`).

One layer of the cache notes where its rows come from. The cache itself stays what it is: its class, and those of its
layers, are told apart by upstream (`torch.export`).
"""

import weakref
from typing import Any

import torch


# What is remembered on a cache row by row: tensors, and what has `take_rows`.
_REMEMBERED = ("_prunesid_prompt", "_prunesid_rope_deltas", "_prunesid_upstreams_deltas", "_prunesid_columns")
_MOVES = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


class _NotedMove:
    """A method of a cache's layer that moves its rows; `layer._prunesid_rows` says where they come from."""

    def __init__(self, layer: Any, name: str):
        # A layer that held itself would hold its memory until the garbage collector runs.
        self.layer, self.name = weakref.ref(layer), name

    def __call__(self, *args, **kwargs):
        layer = self.layer()
        (moved,) = [*args, *kwargs.values()]
        count = _num_rows(layer)
        if count is None and self.name == "reorder_cache":
            count = len(moved)
        getattr(type(layer), self.name)(layer, moved)
        rows, count = getattr(layer, "_prunesid_rows", None) or (None if count is None else torch.arange(count), count)
        if rows is None:
            return
        if self.name == "batch_repeat_interleave":
            rows = rows.repeat_interleave(moved)
        else:
            rows = rows.to(moved.device)[moved] if isinstance(moved, torch.Tensor) else rows[moved]
        layer._prunesid_rows = rows, count

    def __deepcopy__(self, memo: dict[int, Any]) -> "_NotedMove":
        return _NotedMove(memo.get(id(self.layer()), self.layer()), self.name)

    def __reduce__(self):
        return _NotedMove, (self.layer(), self.name)


def _num_rows(layer: Any) -> int | None:
    keys = getattr(layer, "keys", None)
    return len(keys) if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None


def follow_rows(cache: Any) -> None:
    """What is remembered on `cache` follows its rows from now on."""
    layers = list(getattr(cache, "layers", ()))
    layer = next((layer for layer in layers if _num_rows(layer) is not None), layers[0] if layers else None)
    for name in _MOVES:
        if hasattr(type(layer), name) and name not in vars(layer):
            setattr(layer, name, _NotedMove(layer, name))


def settle_rows(cache: Any) -> None:
    """Moves the rows of what is remembered on `cache` as its own were moved; else nothing waits for the device."""
    for layer in getattr(cache, "layers", ()):
        if getattr(layer, "_prunesid_rows", None) is None:
            continue
        moved, count = layer._prunesid_rows
        layer._prunesid_rows, moved = None, moved.cpu()
        for name in _REMEMBERED:
            value = getattr(cache, name, None)
            if value is not None:
                setattr(cache, name, _take_rows(value, moved, count))


def _take_rows(value: Any, moved: torch.LongTensor, count: int) -> Any:
    """Of `count` rows of a cache those that were `moved`, where `value` has one for each of them, or for several."""
    if not len(value) or count % len(value):
        return value
    rows = moved // (count // len(value))
    # Rows that were repeated are remembered once, as those of beams are.
    repeats = next(times for times in range(len(rows), 0, -1) if len(rows) % times == 0 and _repeats(rows, times))
    rows = rows[::repeats]
    if torch.equal(rows, torch.arange(len(value))):
        return value
    return value[rows.to(value.device)] if isinstance(value, torch.Tensor) else value.take_rows(rows)


def _repeats(rows: torch.LongTensor, times: int) -> bool:
    """Whether `rows` come `times` times each in succession."""
    blocks = rows.view(-1, times)
    return bool((blocks == blocks[:, :1]).all())
