"""Views of inputs (images, tiles, crops or frames), and the rows that are kept of upstream's features of them."""

import itertools
from typing import Any, NamedTuple

import torch


class View(NamedTuple):
    """
    One view of an input.

    Args:
        rows (`torch.LongTensor` of shape `(tokens,)`): its tokens among upstream's features of the input, ascending.
        patches (`torch.LongTensor` of shape `(tokens,)`, *optional*):
            The same tokens among the patches of the view in the vision tower, where tokens are compared there.
        cls_at (`int`, *optional*): the row before which its CLS token goes, if that is kept; by default its first.
    """

    rows: torch.LongTensor
    patches: torch.LongTensor | None = None
    cls_at: int | None = None


def as_views(views: list[int] | list[View]) -> list[View]:
    """Views given by their lengths, one behind the other, as [`View`]s."""
    lengths: Any = views
    if lengths and isinstance(lengths[0], int):
        return [View(rows) for rows in torch.arange(sum(lengths)).split(lengths)]
    return lengths


def table_of(rows: list[torch.LongTensor]) -> torch.LongTensor:
    """Rows of several views as one table `(views, longest)`, on the host; shorter ones repeat row 0."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def rows_of(table: torch.LongTensor, indices: torch.LongTensor, counts: list[int]) -> torch.LongTensor:
    """
    The entries of `table` that were chosen, one view behind the other, without a wait for the device.

    Args:
        table (`torch.LongTensor` of shape `(views, tokens)`): on the host.
        indices (`torch.LongTensor` of shape `(views, largest N)`), counts (`list[int]`): of `choose_tokens`.
    """
    device, width = indices.device, indices.shape[1]
    chosen = table.to(device, non_blocking=True).gather(1, indices.clamp(max=table.shape[1] - 1)).flatten()
    if set(counts) == {width}:
        return chosen
    slots = torch.cat([torch.arange(count) + view * width for view, count in enumerate(counts)])
    return chosen[slots.to(device, non_blocking=True)]


def put_merged(features: torch.Tensor, table: torch.LongTensor, merged: Any) -> torch.Tensor:
    """`features` `(rows, dim)` with those of a [`Merged`] in place of the rows in `table` that they stand for."""
    places = rows_of(table[merged.views], merged.indices, merged.counts)
    values = torch.cat([own[:count] for own, count in zip(merged.features, merged.counts)])
    return features.index_copy(0, places, values.to(features.dtype))


def kept_rows(
    views: list[list[View]],
    sizes: list[int],
    is_whole: list[bool],
    indices: torch.LongTensor,
    counts: list[int],
    num_before: int = 0,
) -> tuple[torch.LongTensor, list[int]]:
    """
    The rows that are kept of several inputs, counted through, in any order, and how many of each.

    Args:
        views (`list[list[View]]`), sizes (`list[int]`): of each input, and its T rows.
        is_whole (`list[bool]`): which inputs keep all of their rows, those of no view included.
        indices (`torch.LongTensor` of shape `(views, largest N)`), counts (`list[int]`): of `choose_tokens`.
        num_before (`int`): rows in front of each view that stay with it.
    """
    rows, chosen, known, of_inputs, of_views = [], [], [], [], iter(counts)
    for own, size, start, whole in zip(views, sizes, itertools.accumulate(sizes, initial=0), is_whole):
        kept = [next(of_views) for _ in own]
        rows += [view.rows + start for view in own]
        chosen += [0] * len(own) if whole else kept
        first = [start + int(view.rows[0]) for view in own if num_before and len(view.rows)]
        known += (
            [torch.arange(start, start + size)] if whole else [torch.arange(row - num_before, row) for row in first]
        )
        of_inputs.append(size if whole else sum(kept) + num_before * len(first))
    found = rows_of(table_of(rows), indices, chosen)
    if known:
        found = torch.cat([torch.cat(known).to(found.device, non_blocking=True), found])
    return found, of_inputs


def keep_rows(features: torch.Tensor, sizes: list[int], rows: torch.LongTensor, counts: list[int], cls=None):
    """
    The kept rows of several inputs, in order.

    Args:
        features (`torch.Tensor` of shape `(rows, hidden_size)`), sizes (`list[int]`): of all inputs, and T of each.
        rows (`torch.LongTensor`): kept rows of all inputs, counted through, in any order.
        counts (`list[int]`): how many of each input, with its CLS tokens.
        cls (`tuple`, *optional*):
            Features `(cls, hidden_size)` of CLS tokens, which have no row, and the row `(cls,)` that each precedes.

    Returns:
        Features `(N, hidden_size)`, and indices `(N,)` into its T rows, -1 for a CLS token, of each input.
    """
    device = rows.device
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    starts = starts.repeat_interleave(torch.tensor(counts), output_size=sum(counts))
    starts = starts.to(device, non_blocking=True)
    if cls is None:
        rows = rows.sort().values
        return features[rows].split(counts), (rows - starts).split(counts)
    cls_features, places = cls
    order = torch.cat([2 * places.to(device), 2 * rows + 1]).argsort(stable=True)
    kept = torch.cat([cls_features.to(device), features[rows]])[order]
    is_cls = order < len(places)
    indices = torch.cat([torch.zeros_like(places, device=device), rows])[order] - starts
    return kept.split(counts), indices.masked_fill(is_cls, -1).split(counts)
