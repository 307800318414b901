"""
How placeholders are read: as T of each input (image or clip), as the stock processor writes, or as N, as ours does.

All of it is on the host; the columns that remain are marked on the device, which nothing waits for.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from .runs import largest_remainder


class Reading:
    """
    Placeholders `(batch, length)`, read as T of each view (`is_full`) or as N of each.

    Args:
        placeholders (`torch.BoolTensor` of shape `(batch, length)`): visual placeholders, in the order of the views.
        num_placeholders, num_kept (`list[int]`): T and N of each view.
        is_full (`bool`).
        row_ends (`list[int]`, *optional*):
            Where the rows end, counted in placeholders. A traced graph cannot count them.
    """

    def __init__(
        self,
        placeholders: torch.BoolTensor,
        num_placeholders: list[int],
        num_kept: list[int],
        is_full: bool,
        row_ends: list[int] | None = None,
    ):
        self.placeholders, self.is_full = placeholders, is_full
        self.shortens = is_full and sum(num_placeholders) != sum(num_kept)
        self.num_placeholders, self.counts = num_placeholders, num_placeholders if is_full else num_kept
        self.view_ends = list(itertools.accumulate(self.counts, initial=0))
        self.row_ends = placeholders.sum(1).cumsum(0).tolist() if row_ends is None else row_ends

    @property
    def fits(self) -> bool:
        """Whether the rows hold whole views, and all of them."""
        return self.row_ends[-1] == self.view_ends[-1] and set(self.row_ends) <= set(self.view_ends)

    @property
    def views_of_rows(self) -> list[range]:
        """The views of each row."""
        ends = [self.view_ends.index(end) for end in self.row_ends]
        return [range(start, end) for start, end in zip([0, *ends], ends)]

    @property
    def places(self) -> torch.LongTensor:
        """Where the placeholders are, counted through the columns of all rows."""
        flat = self.placeholders.flatten()
        if torch.compiler.is_compiling():
            return (~flat).to(torch.uint8).argsort(stable=True)[: self.row_ends[-1]]
        return flat.nonzero()[:, 0]

    def runs(self) -> list[tuple[int, int]]:
        """Where the runs of adjacent placeholders start and end, counted in placeholders."""
        flat = torch.nn.functional.pad(self.placeholders, (1, 1)).flatten()
        counted, edges = flat.cumsum(0), flat.long().diff()
        return list(zip(counted[:-1][edges == 1].tolist(), counted[:-1][edges == -1].tolist()))

    @property
    def ends_runs_with_views(self) -> bool:
        return {end for _, end in self.runs()} <= set(self.view_ends)

    def is_doubtful(self, is_token: torch.Tensor | None, short_runs: Callable[[], Any] = lambda: None) -> bool:
        """
        Whether a prompt of T placeholders a view, with fewer views or cut at its end, has the same ids: its runs are
        none of `short_runs`, where these are known, a run of N of several views is as long as T of fewer of them, or
        the last token of a row is a placeholder.
        """
        if self.is_full or self.counts == self.num_placeholders:
            return False
        expected = short_runs()
        if expected is not None and [end - start for start, end in self.runs()] not in expected:
            return True
        for start, end in self.runs():
            inside = [view for view, last in enumerate(self.view_ends[1:]) if start < last <= end]
            if end - start in itertools.accumulate(self.num_placeholders[view] for view in inside[:-1]):
                return True
        columns = torch.arange(self.placeholders.shape[1])
        is_token = torch.ones_like(self.placeholders) if is_token is None else is_token.bool()
        last = columns.masked_fill(~is_token, 0).amax(1, keepdim=True)
        return bool((self.placeholders & is_token).gather(1, last).any())

    def num_dropped(self, num_kept: list[int], first: int = 0) -> list[int]:
        """How many columns each row loses, of views from column `first` on."""
        length, places = self.placeholders.shape[1], self.places if first else None
        lost = [0] * len(self.row_ends)
        for start, total, kept in zip(self.view_ends, self.num_placeholders, num_kept):
            if kept < total and (places is None or places[start] % length >= first):
                lost[sum(end <= start for end in self.row_ends)] += total - kept
        return lost

    def drops_between(self, start: int, end: int, num_kept: list[int]) -> bool:
        """Whether a view that loses tokens has placeholders in the columns from `start` to `end`."""
        if start >= end:
            return False
        loses = [kept < total for kept, total in zip(num_kept, self.num_placeholders)]
        loses = torch.tensor(loses).repeat_interleave(torch.tensor(self.num_placeholders))
        columns = (self.places % self.placeholders.shape[1])[loses]
        return bool(((columns >= start) & (columns < end)).any())

    def mark_kept(
        self,
        keep_indices: list[torch.LongTensor],
        device: torch.device,
        views: list[list[int]] | None = None,
        num_kept_of_views: list[list[int]] | None = None,
    ) -> torch.BoolTensor:
        """
        The columns `(batch, length)` that remain of a prompt of T placeholders a view, on `device`, for which nothing
        waits unless text stands between the placeholders of a view whose N is not known.

        Args:
            keep_indices (`list[torch.LongTensor]`):
                The kept tokens of each input. -1 stands for a token that has no placeholder of its own (the CLS token)
                and takes the input's first free one.
            views, num_kept_of_views (`list[list[int]]`, *optional*):
                T and N of each view of each input, one behind the other.
        """
        sizes, total, num_kept = self.num_placeholders, sum(self.num_placeholders), list(map(len, keep_indices))
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]

        def of_inputs(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
            """A value of each input, for each of its `counts` tokens."""
            spread = values.repeat_interleave(torch.tensor(counts), output_size=sum(counts))
            return spread.to(device, non_blocking=True)

        inputs, indices = torch.arange(len(sizes)), torch.cat([kept.to(device) for kept in keep_indices])
        has_place = indices >= 0
        # One place more takes what has none.
        flags = torch.zeros(total + 1, dtype=torch.bool, device=device)
        flags = flags.index_fill(0, torch.where(has_place, indices + of_inputs(starts, num_kept), total), True)[:-1]
        missing = torch.zeros(len(sizes), dtype=torch.long, device=device)
        missing = missing.index_add(0, of_inputs(inputs, num_kept), (~has_place).long())
        free = torch.nn.functional.pad((~flags).cumsum(0), (1, 0))
        rank = free[1:] - free.index_select(0, of_inputs(starts, sizes))
        flags = flags | (~flags & (rank <= missing.index_select(0, of_inputs(inputs, sizes))))

        places = self.places
        if views is not None and not torch.compiler.is_compiling():
            of_views = [None] * len(views) if num_kept_of_views is None else num_kept_of_views
            for own, *arguments in zip(flags.split(sizes), places.split(sizes), views, of_views):
                _level_runs(own, *arguments)
        keep_mask = torch.ones(self.placeholders.numel(), dtype=torch.bool, device=device)
        keep_mask = keep_mask.index_copy(0, places.to(device, non_blocking=True), flags)
        return keep_mask.view(self.placeholders.shape)


def read_placeholders(
    placeholders: torch.BoolTensor,
    num_placeholders: list[int],
    num_kept: list[int],
    modality: str = "image",
    new: torch.BoolTensor | None = None,
    is_token: torch.Tensor | None = None,
    is_stated: bool = True,
    short_runs: Callable[[], list[list[int]] | None] = lambda: None,
) -> Reading | None:
    """
    How a prompt is to be read; everything is on the host.

    Args:
        placeholders (`torch.BoolTensor` of shape `(batch, length)`): visual placeholders, in the order of the views.
        num_placeholders (`list[int]`): T of each view, the placeholders that the stock processor writes for it.
        num_kept (`list[int]`): N of each view.
        modality (`str`): named in errors.
        new (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
            The placeholders that are in no cache yet, if the views may be those of these alone.
        is_token (`torch.Tensor` of shape `(batch, length)`, *optional*): what is no padding.
        is_stated (`bool`): N was passed along with the prompt, as our processor does, which dispels any doubt.
        short_runs (`Callable`, *optional*):
            Gives lists of the lengths of all runs, of which our processor writes one for these N, or None.

    Returns:
        The reading with T or with N placeholders of each view; None for N in a graph.

    Raises:
        `ValueError`: if the prompt has neither T nor N placeholders for each view, or may be read either way.
    """
    full, short = sum(num_placeholders), sum(num_kept)
    if torch.compiler.is_compiling():
        return _read_traced(placeholders, num_placeholders, num_kept, modality, is_stated)
    candidates = [placeholders, *([] if new is None else [new])]
    readings = [
        Reading(candidate, num_placeholders, num_kept, is_full)
        for candidate in candidates
        for is_full in (True, False)
    ]
    readings = [reading for reading in readings if reading.fits]
    label = modality.capitalize()
    if not readings:
        rows = candidates[-1].sum(1).tolist()
        found = sum(rows)
        if found not in (full, short):
            raise ValueError(
                f"{label} features and {modality} tokens do not match, tokens: {found}, features: {short}. A prompt "
                f"holds either every placeholder that the stock processor writes ({full} for these "
                f"{len(num_placeholders)} {modality}s) or one for each kept token ({short}); build it with the "
                "model's processor."
            )
        counts = num_kept if found == short else num_placeholders
        ends = set(itertools.accumulate(counts, initial=0))
        row = next(row for row, end in enumerate(itertools.accumulate(rows)) if end not in ends)
        raise ValueError(
            f"{label} features and {modality} tokens do not match, tokens: {rows[row]} in row {row}, which is no "
            f"whole number of {modality}s of {counts} tokens; build the prompt with the model's processor."
        )
    clear = (
        readings if is_stated else [reading for reading in readings if not reading.is_doubtful(is_token, short_runs)]
    )
    if not clear:
        raise ValueError(
            f"{label} features and {modality} tokens do not match for certain, tokens: {readings[0].row_ends[-1]}, "
            f"features: {short}: the prompt may have one placeholder for each kept token, or be a full one with fewer "
            f"{modality}s or cut at its end. Build it with the model's processor and pass its num_visual_tokens, or "
            "pass the full prompt."
        )
    # The runs of a whole conversation tell apart what their sum does not.
    return next((reading for reading in clear if reading.ends_runs_with_views), clear[0])


def _read_traced(
    placeholders: torch.BoolTensor, num_placeholders: list[int], num_kept: list[int], modality: str, is_stated: bool
) -> Reading | None:
    """
    As `read_placeholders`, in a graph, which cannot count: a prompt that comes with its N, or that is too short for T
    placeholders, is short, and its placeholders are counted by upstream inside the graph. Any other has T of each view
    and as many views in each row.
    """
    batch, length = placeholders.shape
    if is_stated or batch * length < sum(num_placeholders):
        return None
    views = len(num_placeholders) // batch
    problem = (
        f"A full prompt of {len(num_placeholders)} {modality}s in {batch} rows cannot be traced by torch.compile or "
        f"torch.export: each row must have as many {modality}s, of T tokens each. Pass short prompts with their "
        "num_visual_tokens, as the model's processor writes them, or do not trace this batch."
    )
    if views * batch != len(num_placeholders):
        raise ValueError(problem)
    row_ends = list(itertools.accumulate(num_placeholders))[views - 1 :: views]
    lost = [total - kept for total, kept in zip(num_placeholders, num_kept)]
    if len({sum(lost[views * row : views * (row + 1)]) for row in range(batch)}) > 1:
        raise ValueError(problem)
    sizes = [end - start for start, end in zip([0, *row_ends], row_ends)]
    is_right = placeholders.sum(1) == torch.tensor(sizes, device=placeholders.device)
    torch._assert_async(is_right.all(), problem)
    return Reading(placeholders, num_placeholders, num_kept, True, row_ends)


def run_lengths(placeholders: torch.BoolTensor) -> list[int]:
    """The lengths of the runs of adjacent placeholders in the rows."""
    edges = torch.nn.functional.pad(placeholders.long(), (1, 1)).diff(dim=1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def _level_runs(
    flags: torch.BoolTensor, columns: torch.LongTensor, views: list[int], num_kept: list[int] | None
) -> None:
    """
    A processor cannot know which rows of a view keep tokens. Where text stands between the placeholders `columns` of a
    view, they leave each run in equal shares, as in the prompts that it writes; what they hold stays in order. `flags`
    `(tokens,)` of an input are changed in place.
    """
    starts = [0, *((columns.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(columns)]
    first = 0
    for view, length in enumerate(views if len(starts) > 2 else ()):
        inside = [start for start in starts if first < start < first + length]
        runs = torch.tensor([first, *inside, first + length]).diff().tolist()
        if inside:
            of_view = flags[first : first + length]
            kept = largest_remainder(runs, int(of_view.sum()) if num_kept is None else num_kept[view])
            levelled = [torch.arange(run) < count for run, count in zip(runs, kept)]
            of_view.copy_(torch.cat(levelled).to(flags.device, non_blocking=True))
        first += length
