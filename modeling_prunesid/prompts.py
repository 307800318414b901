"""
Shortened prompts as tensors: which columns of a caller's prompt remain, what filled a cache, which placeholders go.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .upstream import CACHE_NAME


IGNORED_LABEL = -100


@dataclass
class ShortPrompt:
    """
    Which columns of a prompt remain.

    Args:
        source (`torch.LongTensor` of shape `(batch, short_length)`):
            For each column of the short prompt, its column in the full prompt; -1 where padding was added because rows
            of a batch lost different numbers of columns.
        keep_mask (`torch.BoolTensor` of shape `(batch, full_length)`):
            The columns of the full prompt that remain.
        dropped (`torch.BoolTensor` of shape `(batch, full_length)`, *optional*):
            The columns that were dropped. The others that do not remain are padding, which gave way. Default: all that
            do not remain.
        moved (`torch.LongTensor` of shape `(batch, 1)`, *optional*):
            By how much the positions that the caller gave were moved up at the end of the prompt.
        cached_before (`int`): columns of a cache that come before the prompt.
        is_own (`torch.BoolTensor` of shape `(batch, short_length)`, *optional*):
            On the host: which columns of the short prompt are the caller's, and no padding that was added.
        num_dropped, first_ahead (`torch.LongTensor` of shape `(batch, 1)`, *optional*):
            On the host: how many columns each row lost, and by how many more the short prompt has than the row alone
            up to the first column of its own.
    """

    source: torch.LongTensor
    keep_mask: torch.BoolTensor
    dropped: torch.BoolTensor = None
    moved: torch.LongTensor | None = None
    cached_before: int = 0
    is_own: torch.BoolTensor | None = None
    num_dropped: Any = None
    first_ahead: torch.LongTensor | None = None

    def __post_init__(self) -> None:
        if self.dropped is None:
            self.dropped = ~self.keep_mask
        if self.is_own is None:
            self.is_own = (self.source >= 0).cpu()
        if self.num_dropped is None:
            self.num_dropped = self.dropped.sum(1, keepdim=True).cpu()
        if self.first_ahead is None:
            first = (self.source >= 0).long().argmax(1, keepdim=True)
            alone = torch.nn.functional.pad((~self.dropped).cumsum(1) - 1, (0, 1))
            self.first_ahead = (first - alone.gather(1, self.source.gather(1, first).clamp(min=0))).cpu()

    @classmethod
    def from_keep_mask(
        cls,
        keep_mask: torch.BoolTensor,
        padding_side: str,
        minimum_length: int = 0,
        padding: torch.BoolTensor | None = None,
        num_dropped: torch.LongTensor | None = None,
    ) -> "ShortPrompt":
        """
        The columns that `keep_mask` `(batch, full_length)` marks, moved together. Rows shorter than the longest one,
        or than `minimum_length`, are filled up on the `padding_side`, `"left"` or `"right"`. The columns `padding`
        `(batch, full_length)`, known on the host, give way. With `num_dropped` `(batch, 1)`, how many columns of each
        row `keep_mask` leaves out, nothing waits for the device.
        """
        dropped, device = ~keep_mask, keep_mask.device
        if num_dropped is None:
            num_dropped = dropped.sum(1, keepdim=True).cpu()
        gone = num_dropped
        first_ahead = torch.zeros_like(num_dropped)
        if padding is not None:
            first_ahead = -(padding.long().cumprod(1).sum(1, keepdim=True))
            gone = gone + padding.sum(1, keepdim=True)
            keep_mask = keep_mask & ~padding.to(device, non_blocking=True)
        lengths = keep_mask.shape[1] - gone
        length = max(int(lengths.max()), minimum_length)
        # A stable sort moves the kept columns to the front and leaves them in order.
        source = (~keep_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
        columns = torch.arange(length)
        if padding_side == "left":
            columns = columns - (length - lengths)
            first_ahead = first_ahead + length - lengths
            is_own = columns >= 0
            source = source.gather(1, columns.clamp(min=0).to(device, non_blocking=True))
        else:
            is_own = columns < lengths
        source = source.masked_fill(~is_own.to(device, non_blocking=True), -1)
        return cls(source, keep_mask, dropped, is_own=is_own, num_dropped=num_dropped, first_ahead=first_ahead)

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> "ShortPrompt":
        """All of `length` columns."""
        source = torch.arange(length, device=device).expand(batch, -1)
        nothing = torch.zeros(batch, 1, dtype=torch.long)
        is_own = torch.ones(batch, length, dtype=torch.bool)
        keep_mask = torch.ones_like(source, dtype=torch.bool)
        return cls(source, keep_mask, is_own=is_own, num_dropped=nothing, first_ahead=nothing)

    @property
    def full_length(self) -> int:
        return self.keep_mask.shape[1]

    @property
    def length(self) -> int:
        return self.source.shape[1]

    def take(self, columns: torch.Tensor, fill: float | int) -> torch.Tensor:
        """The remaining columns of a `(batch, full_length, ...)` tensor, with `fill` in added padding."""
        source = self.source.to(columns.device)
        shape = (*source.shape, *[1] * (columns.dim() - 2))
        index = source.clamp(min=0).view(shape).expand(-1, -1, *columns.shape[2:])
        return columns.gather(1, index).masked_fill((source < 0).view(shape), fill)

    @property
    def has_added_padding(self) -> bool:
        return not bool(self.is_own.all())

    @property
    def columns_ahead(self) -> torch.LongTensor:
        """How many columns more the short prompt has than each row alone, without added padding: `(batch, 1)`."""
        return self.length - self.full_length + self.num_dropped

    def callers_columns(self) -> torch.LongTensor:
        """
        For each column of the full prompt, the short column whose value it carries, `(batch, full_length)`: its own,
        or that of the last column before it that remains, or of the first where none is before it.
        """
        is_own = self.source >= 0
        columns = torch.arange(self.length, device=self.source.device).expand_as(self.source)
        # One column more takes what has no place in the full prompt.
        found = torch.full_like(self.keep_mask, -1, dtype=torch.long)
        found = torch.nn.functional.pad(found, (0, 1), value=-1)
        found = found.scatter(1, torch.where(is_own, self.source, self.full_length), columns)[:, :-1]
        first = columns.masked_fill(~is_own, self.length - 1).amin(1, keepdim=True)
        return torch.maximum(found.cummax(1).values, first)

    def expand(self, states: torch.Tensor) -> torch.Tensor:
        """States `(batch, short_length, ...)` in the columns of the full prompt."""
        return gather_columns(states, self.callers_columns())

    def take_positions(self, position_ids: torch.LongTensor, is_token: torch.Tensor | None = None) -> torch.LongTensor:
        """
        Positions `(batch, full_length)` of the remaining columns, moved up to be contiguous. A sequence packed behind
        another one in the same row, where positions start anew, is moved within itself. Columns that `is_token`
        `(batch, full_length)` does not mark are moved along where their positions go on from those before them, and
        otherwise keep what they have.
        """
        position_ids = position_ids.expand(len(self.keep_mask), -1)
        return self.take(position_ids - self._dropped_before(position_ids, is_token), fill=0)

    def moved_at_end(self, position_ids: torch.LongTensor, is_token: torch.Tensor | None = None) -> torch.LongTensor:
        """By how much [`take_positions`] moves what follows each row's last position, of shape `(batch, 1)`."""
        position_ids = position_ids.expand(len(self.keep_mask), -1)
        # Positions of padding behind a row do not rise.
        rises = torch.nn.functional.pad(position_ids.diff(dim=1) > 0, (1, 0), value=True)
        rises = rises if is_token is None else is_token.to(rises.device).bool()
        columns = torch.arange(self.full_length, device=position_ids.device)
        last = columns.masked_fill(~rises, 0).amax(1, keepdim=True)
        counted = self._counted(position_ids, is_token)
        return (self._dropped_before(position_ids, is_token) + counted).gather(1, last)

    def _counted(self, position_ids: torch.LongTensor, is_token: torch.Tensor | None) -> torch.LongTensor:
        """1 for each dropped column that positions `(batch, full_length)` count, which masked ones may not."""
        dropped = self.dropped.to(position_ids.device)
        if is_token is not None:
            rises = torch.nn.functional.pad(position_ids.diff(dim=1) == 1, (1, 0), value=False)
            dropped = dropped & (is_token.to(dropped.device).bool() | rises)
        return dropped.long()

    def _dropped_before(self, position_ids: torch.LongTensor, is_token: torch.Tensor | None) -> torch.LongTensor:
        """How many columns were dropped before each column of its sequence: `(batch, full_length)`."""
        counted = self._counted(position_ids, is_token)
        before = counted.cumsum(1) - counted
        columns = torch.arange(self.full_length, device=position_ids.device).expand_as(position_ids)
        if is_token is None:
            starts = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
            return before - before.gather(1, columns.masked_fill(~starts, 0).cummax(1).values)
        # A sequence starts at the first token, and where positions do not rise from one token to the next.
        is_token = is_token.to(position_ids.device).bool()
        seen = columns.masked_fill(~is_token, -1).cummax(1).values
        last = torch.nn.functional.pad(seen[:, :-1], (1, 0), value=-1)
        previous = position_ids.gather(1, last.clamp(min=0))
        starts = is_token & ((last < 0) | (position_ids <= previous))
        first = columns.masked_fill(~starts, 0).cummax(1).values
        return (before - before.gather(1, first)) * (is_token | ((last >= 0) & (position_ids >= previous)))

    def then(self, rest: "ShortPrompt") -> "ShortPrompt":
        """This prompt continued by the columns of `rest`."""
        shifted = rest.source + self.full_length * (rest.source >= 0)
        moved = [part.moved for part in (self, rest) if part.moved is not None]
        first_ahead = torch.where(
            self.is_own.any(1, keepdim=True), self.first_ahead, self.columns_ahead + rest.first_ahead
        )
        return ShortPrompt(
            torch.cat([self.source, shifted], dim=1),
            torch.cat([self.keep_mask, rest.keep_mask], dim=1),
            torch.cat([self.dropped, rest.dropped], dim=1),
            sum(moved) if moved else None,
            is_own=torch.cat([self.is_own, rest.is_own], dim=1),
            num_dropped=self.num_dropped + rest.num_dropped,
            first_ahead=first_ahead,
        )

    def repeat_rows(self, times: int) -> "ShortPrompt":
        """Each row `times` times in succession, as `generate` repeats them for beams."""
        if times == 1:
            return self
        return ShortPrompt(
            self.source.repeat_interleave(times, 0),
            self.keep_mask.repeat_interleave(times, 0),
            self.dropped.repeat_interleave(times, 0),
            None if self.moved is None else self.moved.repeat_interleave(times, 0),
            is_own=self.is_own.repeat_interleave(times, 0),
            num_dropped=self.num_dropped.repeat_interleave(times, 0),
            first_ahead=self.first_ahead.repeat_interleave(times, 0),
        )


@dataclass
class CachedPrompt:
    """
    The prompt that filled a cache: its caller's ids `(batch, full_length)`, if known, and how it was shortened.
    Columns that another call put into the cache have the id -1.
    """

    input_ids: torch.LongTensor | None
    prompt: ShortPrompt

    def remember(self, cache: Any) -> None:
        """Leave this on a cache, for the calls that go on with it."""
        if cache is not None:
            cache._prunesid_prompt = self

    def behind(self, cache: Any) -> "CachedPrompt":
        """This as the end of all that fills `cache`, which remembers the part before if that was shortened."""
        held, batch, device = self.prompt.cached_before, len(self.prompt.source), self.prompt.source.device
        if cache is None or not held:
            return self
        earlier = CachedPrompt.recall(cache, batch)
        if earlier is None:
            nothing = torch.zeros(batch, 0, dtype=torch.long, device=device)
            earlier = CachedPrompt(nothing, ShortPrompt.whole(batch, 0, device))
        followed = held - earlier.prompt.length
        if followed < 0:  # the cache was cropped
            return self
        input_ids = None
        if self.input_ids is not None and earlier.input_ids is not None:
            unknown = self.input_ids.new_full((batch, followed), -1)
            input_ids = torch.cat([earlier.input_ids.to(unknown.device), unknown, self.input_ids], dim=1)
        before = earlier.prompt.then(ShortPrompt.whole(batch, followed, device))
        return CachedPrompt(input_ids, before.then(self.prompt))

    @staticmethod
    def recall(cache: Any, batch: int) -> "CachedPrompt | None":
        """
        What filled `cache`, for `batch` rows (beams repeat the rows of a cache); None where nothing was dropped.

        Raises:
            `ValueError`: if the rows of the cache are not those of the prompt that filled it.
        """
        cached = getattr(cache, "_prunesid_prompt", None)
        if cached is None or cache.get_seq_length() == 0:
            return None
        rows = len(cached.prompt.source)
        if batch % rows:
            raise ValueError(
                f"{CACHE_NAME} was filled by {rows} rows and is continued by {batch}, so that it is unknown what "
                "was dropped from which. Pass a multiple of its rows, or start from an empty cache."
            )
        times = batch // rows
        if times == 1:
            return cached
        input_ids = cached.input_ids if cached.input_ids is None else cached.input_ids.repeat_interleave(times, 0)
        return CachedPrompt(input_ids, cached.prompt.repeat_rows(times))

    def check_followed_by(self, input_ids: torch.LongTensor | None) -> None:
        """
        Raises:
            `ValueError`: if `input_ids` `(batch, length)`, the whole conversation for `generate`, begin neither with
                this prompt nor with its short form.
        """
        if self.input_ids is None or input_ids is None or self.starts(input_ids):
            return
        short = self.prompt.take(self.input_ids, fill=-1).to(input_ids.device)
        length = short.shape[1]
        if input_ids.shape[1] < length or not bool(((input_ids[:, :length] == short) | (short < 0)).all()):
            raise ValueError(
                f"{CACHE_NAME} was filled by another prompt than input_ids begin with. Pass the whole conversation "
                "of the cache, or an empty cache."
            )

    def starts(self, input_ids: torch.LongTensor | None) -> bool:
        """Whether `input_ids` `(batch, length)` begin with this prompt, as those of a whole conversation do."""
        length = self.prompt.full_length
        if self.input_ids is None or input_ids is None or input_ids.shape[1] < length:
            return False
        expected = self.input_ids.to(input_ids.device)
        return bool(((input_ids[:, :length] == expected) | (expected < 0)).all())


class Reading:
    """
    Placeholders `(batch, length)`, read as T of each view (`is_full`) or as N of each.

    Args:
        placeholders (`torch.BoolTensor` of shape `(batch, length)`): visual placeholders, in the order of the views.
        num_placeholders, num_kept (`list[int]`): T and N of each view.
        is_full (`bool`).
    """

    def __init__(
        self, placeholders: torch.BoolTensor, num_placeholders: list[int], num_kept: list[int], is_full: bool
    ):
        self.placeholders, self.is_full = placeholders, is_full
        self.num_placeholders, self.counts = num_placeholders, num_placeholders if is_full else num_kept
        self.view_ends = torch.tensor([0, *self.counts]).cumsum(0).tolist()
        self.row_ends = placeholders.sum(1).cumsum(0).tolist()

    @property
    def fits(self) -> bool:
        """Whether the rows hold whole views, and all of them."""
        return self.row_ends[-1] == self.view_ends[-1] and set(self.row_ends) <= set(self.view_ends)

    def runs(self) -> list[tuple[int, int]]:
        """Where the runs of adjacent placeholders start and end, counted in placeholders."""
        flat = torch.nn.functional.pad(self.placeholders, (1, 1)).flatten()
        counted, edges = flat.cumsum(0), flat.long().diff()
        return list(zip(counted[:-1][edges == 1].tolist(), counted[:-1][edges == -1].tolist()))

    @property
    def ends_runs_with_views(self) -> bool:
        return {end for _, end in self.runs()} <= set(self.view_ends)

    def is_doubtful(self, is_token: torch.Tensor | None) -> bool:
        """
        Whether a prompt of T placeholders a view, with fewer views or cut at its end, has the same ids: a run of N of
        several views that is as long as T of fewer of them, or the last token of a row is a placeholder.
        """
        if self.is_full or self.counts == self.num_placeholders:
            return False
        for start, end in self.runs():
            inside = [view for view, last in enumerate(self.view_ends[1:]) if start < last <= end]
            full = torch.tensor([self.num_placeholders[view] for view in inside[:-1]]).cumsum(0).tolist()
            if end - start in full:
                return True
        columns = torch.arange(self.placeholders.shape[1], device=self.placeholders.device)
        is_token = torch.ones_like(self.placeholders) if is_token is None else is_token.to(columns.device).bool()
        last = columns.masked_fill(~is_token, 0).amax(1, keepdim=True)
        return bool((self.placeholders & is_token).gather(1, last).any())

    def num_dropped(self, num_kept: list[int], first: int = 0) -> torch.LongTensor:
        """How many columns each row loses, of views from column `first` on: `(batch, 1)`."""
        batch, length = self.placeholders.shape
        columns, lost = self.placeholders.flatten().nonzero()[:, 0], torch.zeros(batch, dtype=torch.long)
        for start, total, kept in zip(self.view_ends, self.num_placeholders, num_kept):
            if kept < total and columns[start] % length >= first:
                lost[columns[start] // length] += total - kept
        return lost[:, None]

    def drops_between(self, start: int, end: int, num_kept: list[int]) -> bool:
        """Whether a view that loses tokens has placeholders in the columns from `start` to `end`."""
        loses = [kept < total for kept, total in zip(num_kept, self.num_placeholders)]
        loses = torch.tensor(loses).repeat_interleave(torch.tensor(self.num_placeholders))
        columns = (self.placeholders.flatten().nonzero()[:, 0] % self.placeholders.shape[1])[loses]
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
        sizes, total = self.num_placeholders, sum(self.num_placeholders)
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        num_kept = torch.tensor([len(kept) for kept in keep_indices])
        indices = torch.cat([kept.to(device) for kept in keep_indices])
        offsets = starts.repeat_interleave(num_kept).to(device, non_blocking=True)
        has_place = indices >= 0
        # One place more takes what has none.
        flags = torch.zeros(total + 1, dtype=torch.bool, device=device)
        flags = flags.index_fill(0, torch.where(has_place, indices + offsets, total), True)[:-1]
        input_of_kept = torch.arange(len(sizes)).repeat_interleave(num_kept).to(device, non_blocking=True)
        missing = torch.zeros(len(sizes), dtype=torch.long, device=device)
        missing = missing.index_add(0, input_of_kept, (~has_place).long())
        input_of_place = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device, non_blocking=True)
        free = torch.nn.functional.pad((~flags).cumsum(0), (1, 0))
        rank = free[1:] - free.index_select(0, starts.to(device, non_blocking=True)).index_select(0, input_of_place)
        flags = flags | (~flags & (rank <= missing.index_select(0, input_of_place)))

        columns = self.placeholders.flatten().nonzero()[:, 0]
        for index, own in enumerate(columns.split(sizes)):
            if views is not None:
                of_views = None if num_kept_of_views is None else num_kept_of_views[index]
                first = int(starts[index])
                _level_runs(flags[first : first + sizes[index]], own, views[index], of_views)
        keep_mask = torch.ones(self.placeholders.numel(), dtype=torch.bool, device=device)
        keep_mask = keep_mask.index_copy(0, columns.to(device, non_blocking=True), flags)
        return keep_mask.view(self.placeholders.shape)


def read_placeholders(
    placeholders: torch.BoolTensor,
    num_placeholders: list[int],
    num_kept: list[int],
    modality: str = "image",
    new: torch.BoolTensor | None = None,
    is_token: torch.Tensor | None = None,
    is_stated: bool = True,
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

    Returns:
        The reading with T placeholders of each view, or None if the prompt has N placeholders for each view already.

    Raises:
        `ValueError`: if the prompt has neither T nor N placeholders for each view, or may be read either way.
    """
    full, short = sum(num_placeholders), sum(num_kept)
    # A compiled graph cannot count; a prompt too short for T placeholders is checked by upstream inside the graph.
    if torch.compiler.is_compiling() and placeholders.numel() < full:
        return None
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
        ends = set(torch.tensor([0, *counts]).cumsum(0).tolist())
        row = next(row for row, end in enumerate(torch.tensor(rows).cumsum(0).tolist()) if end not in ends)
        raise ValueError(
            f"{label} features and {modality} tokens do not match, tokens: {rows[row]} in row {row}, which is no "
            f"whole number of {modality}s of {counts} tokens; build the prompt with the model's processor."
        )
    clear = readings if is_stated else [reading for reading in readings if not reading.is_doubtful(is_token)]
    if not clear:
        raise ValueError(
            f"{label} features and {modality} tokens do not match for certain, tokens: {readings[0].row_ends[-1]}, "
            f"features: {short}: the prompt may have one placeholder for each kept token, or be a full one with fewer "
            f"{modality}s or cut at its end. Build it with the model's processor and pass its num_visual_tokens, or "
            "pass the full prompt."
        )
    # The runs of a whole conversation tell apart what their sum does not.
    reading = next((reading for reading in clear if reading.ends_runs_with_views), clear[0])
    return reading if reading.is_full and full != short else None


def mark_kept_placeholders(
    placeholders: torch.BoolTensor,
    num_placeholders: list[int],
    keep_indices: list[torch.LongTensor],
    modality: str = "image",
    **options: Any,
) -> torch.BoolTensor | None:
    """The columns `(batch, length)` of a prompt that remain; see `read_placeholders` and `Reading.mark_kept`."""
    num_kept = [len(kept) for kept in keep_indices]
    views = options.pop("views", None)
    reading = read_placeholders(placeholders, num_placeholders, num_kept, modality, **options)
    return None if reading is None else reading.mark_kept(keep_indices, placeholders.device, views)


def gather_columns(states: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
    """The `columns` `(batch, n)` of states `(batch, length, ...)`."""
    columns = columns.to(states.device).view(*columns.shape, *[1] * (states.dim() - 2))
    return states.gather(1, columns.expand(-1, -1, *states.shape[2:]))


def _level_runs(
    flags: torch.BoolTensor, columns: torch.LongTensor, views: list[int], num_kept: list[int] | None = None
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


def largest_remainder(sizes: list[int], total: int) -> list[int]:
    """Shares out `total` in proportion to `sizes`, none above its size; equal remainders go to the earlier one."""
    whole = sum(sizes)
    shares = [size * total // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(sizes[index] * total % whole))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def is_flat(mask: Any) -> bool:
    """Whether a mask has the shape `(batch, length)`. Upstream also takes `(batch, 1, queries, keys)` and dicts."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def shorten_shifted_labels(shift_labels: torch.LongTensor, prompt: ShortPrompt) -> torch.LongTensor:
    """`shift_labels` holds at each column the label of the next one; in the short prompt, of the next that remains."""
    labels = torch.nn.functional.pad(shift_labels[:, :-1], (1, 0), value=IGNORED_LABEL)
    labels = torch.nn.functional.pad(prompt.take(labels, IGNORED_LABEL)[:, 1:], (0, 1), value=IGNORED_LABEL)
    return torch.where(prompt.source.to(labels.device) == prompt.full_length - 1, shift_labels[:, -1:], labels)


def without_answer(placeholders: torch.BoolTensor, start: int, seen: int) -> torch.BoolTensor:
    """
    The placeholders but for ids in the answer to an earlier prompt of length `start`, which are words: the columns up
    to `seen`, that are in its cache, and a last one that is not.
    """
    if not start:
        return placeholders
    is_answer = torch.zeros_like(placeholders)
    is_answer[:, start:seen] = True
    alone = placeholders & ~torch.nn.functional.pad(placeholders[:, 1:], (0, 1))
    is_answer[:, seen : seen + 1] = alone[:, seen : seen + 1]
    return placeholders & ~is_answer


def run_lengths(placeholders: torch.BoolTensor) -> list[int]:
    """The lengths of the runs of adjacent placeholders in the rows."""
    edges = torch.nn.functional.pad(placeholders.long(), (1, 1)).diff(dim=1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def padding_of(mask: torch.Tensor, leading_only: bool) -> torch.BoolTensor:
    """The columns before the first and after the last token of each row; padding is added anew where it is needed."""
    padding = mask.cumsum(1) == 0
    return padding if leading_only else padding | (mask.flip(1).cumsum(1) == 0).flip(1)


def is_right_padded(mask: Any) -> bool:
    """Whether rows of a batch are padded on the right alone."""
    return is_flat(mask) and bool((mask[:, 0] != 0).all() & (mask[:, -1] == 0).any())


def shorten_cached_mask(mask: Any, prompt: ShortPrompt, cached_length: int, new_length: int) -> Any:
    """A mask over the caller's full prompt, what followed it, and the new columns, for a cache of the short prompt."""
    followed = cached_length - prompt.length
    if not is_flat(mask) or mask.shape[1] != prompt.full_length + followed + new_length:
        return mask
    return torch.cat([prompt.take(mask[:, : prompt.full_length], fill=0), mask[:, prompt.full_length :]], dim=1)
