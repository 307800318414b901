"""Shortened prompts as tensors: which columns of a caller's prompt remain, and what becomes of all that runs along."""

from dataclasses import dataclass
from typing import Any

import torch


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
        dropped (`torch.BoolTensor` of shape `(batch, full_length)`):
            The columns that were dropped. The others that do not remain are padding, which gave way.
        num_dropped, first_ahead (`torch.LongTensor` of shape `(batch, 1)`):
            On the host: how many columns each row lost, and by how many more the short prompt has than the row alone
            up to the first column of its own.
        is_own (`torch.BoolTensor` of shape `(batch, short_length)`, *optional*):
            On the host: which columns of the short prompt are the caller's, and no padding that was added. None: all.
        moved (`torch.LongTensor` of shape `(batch, 1)`, *optional*):
            By how much the positions that the caller gave were moved up at the end of the prompt.
        cached_before (`int`): columns of a cache that come before the prompt.
    """

    source: torch.LongTensor
    keep_mask: torch.BoolTensor
    dropped: torch.BoolTensor
    num_dropped: torch.LongTensor
    first_ahead: torch.LongTensor
    is_own: torch.BoolTensor | None = None
    moved: torch.LongTensor | None = None
    cached_before: int = 0

    @classmethod
    def from_keep_mask(
        cls,
        keep_mask: torch.BoolTensor,
        padding_side: str,
        minimum_length: int = 0,
        padding: torch.BoolTensor | None = None,
        num_dropped: list[int] | None = None,
    ) -> "ShortPrompt":
        """
        The columns that `keep_mask` `(batch, full_length)` marks, moved together. Rows shorter than the longest one,
        or than `minimum_length`, are filled up on the `padding_side`, `"left"` or `"right"`. The columns `padding`
        `(batch, full_length)`, known on the host, give way. With `num_dropped`, how many columns of each row
        `keep_mask` leaves out, nothing waits for the device.
        """
        dropped, device, full_length = ~keep_mask, keep_mask.device, keep_mask.shape[1]
        if num_dropped is None:
            num_dropped = dropped.sum(1).tolist()
        lengths, ahead = [full_length - lost for lost in num_dropped], [0] * len(num_dropped)
        if padding is not None:
            lengths = [length - gave for length, gave in zip(lengths, padding.sum(1).tolist())]
            ahead = [-leading for leading in padding.long().cumprod(1).sum(1).tolist()]
            keep_mask = keep_mask & ~padding.to(device, non_blocking=True)
        length = max([minimum_length, *lengths])
        # A stable sort moves the kept columns to the front and leaves them in order.
        source, is_own = (~keep_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :length], None
        if min(lengths) < length:
            columns, ends = torch.arange(length), torch.tensor(lengths)[:, None]
            if padding_side == "left":
                columns = columns - (length - ends)
                ahead = [more + length - own for more, own in zip(ahead, lengths)]
                is_own = columns >= 0
                source = source.gather(1, columns.clamp(min=0).to(device, non_blocking=True))
            else:
                is_own = columns < ends
            source = source.masked_fill(~is_own.to(device, non_blocking=True), -1)
        num_dropped, ahead = torch.tensor(num_dropped)[:, None], torch.tensor(ahead)[:, None]
        return cls(source, keep_mask, dropped, num_dropped, ahead, is_own)

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> "ShortPrompt":
        """All of `length` columns."""
        source, nothing = torch.arange(length, device=device).expand(batch, -1), torch.zeros(batch, 1).long()
        keep_mask = torch.ones_like(source, dtype=torch.bool)
        return cls(source, keep_mask, ~keep_mask, nothing, nothing)

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
        return self.is_own is not None and not bool(self.is_own.all())

    @property
    def added_behind(self) -> int:
        """How many columns of added padding the row has that has most of them behind its own."""
        return 0 if self.is_own is None else int(self.is_own.flip(1).long().argmax(1).max())

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
            rises = position_ids.diff(dim=1) == 1
            # Masked columns may all have position 1, behind a token at 0.
            goes_on = torch.nn.functional.pad(rises, (1, 0)) & torch.nn.functional.pad(rises, (0, 1), value=True)
            dropped = dropped & (is_token.to(dropped.device).bool() | goes_on)
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

    def take_shifted_labels(self, shift_labels: torch.LongTensor) -> torch.LongTensor:
        """`shift_labels` hold at each column the label of the next one; here, of the next that remains."""
        labels = torch.nn.functional.pad(shift_labels[:, :-1], (1, 0), value=IGNORED_LABEL)
        labels = torch.nn.functional.pad(self.take(labels, IGNORED_LABEL)[:, 1:], (0, 1), value=IGNORED_LABEL)
        return torch.where(self.source.to(labels.device) == self.full_length - 1, shift_labels[:, -1:], labels)

    def take_cached_mask(self, mask: Any, cached_length: int, new_length: int) -> Any:
        """A mask over the caller's full prompt, what followed it, and new columns, for a cache of the short one."""
        followed = cached_length - self.length
        if not is_flat(mask) or mask.shape[1] != self.full_length + followed + new_length:
            return mask
        return torch.cat([self.take(mask[:, : self.full_length], fill=0), mask[:, self.full_length :]], dim=1)

    def then(self, rest: "ShortPrompt") -> "ShortPrompt":
        """This prompt continued by the columns of `rest`."""
        is_own = torch.cat([self._own_columns(), rest._own_columns()], dim=1)
        has_own = is_own[:, : self.length].any(1, keepdim=True)
        shifted = rest.source + self.full_length * (rest.source >= 0)
        moved = [part.moved for part in (self, rest) if part.moved is not None]
        return ShortPrompt(
            torch.cat([self.source, shifted], dim=1),
            torch.cat([self.keep_mask, rest.keep_mask], dim=1),
            torch.cat([self.dropped, rest.dropped], dim=1),
            self.num_dropped + rest.num_dropped,
            torch.where(has_own, self.first_ahead, self.columns_ahead + rest.first_ahead),
            is_own,
            sum(moved) if moved else None,
        )

    def _own_columns(self) -> torch.BoolTensor:
        return torch.ones(self.source.shape, dtype=torch.bool) if self.is_own is None else self.is_own

    def take_rows(self, rows: torch.LongTensor) -> "ShortPrompt":
        """The `rows`, known on the host: as `generate` repeats them for beams, or a caller those of a cache."""
        parts: list[Any] = [self.source, self.keep_mask, self.dropped, self.num_dropped, self.first_ahead]
        parts += [self.is_own, self.moved]
        taken: list[Any] = [
            part if part is None else part.index_select(0, rows.to(part.device, non_blocking=True)) for part in parts
        ]
        return ShortPrompt(*taken)


def gather_columns(states: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
    """The `columns` `(batch, n)` of states `(batch, length, ...)`."""
    columns = columns.to(states.device).view(*columns.shape, *[1] * (states.dim() - 2))
    return states.gather(1, columns.expand(-1, -1, *states.shape[2:]))


def is_flat(mask: Any) -> bool:
    """Whether a mask has the shape `(batch, length)`. Upstream also takes `(batch, 1, queries, keys)` and dicts."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def columns_of(inputs: dict[str, Any]) -> Any:
    """The ids `(batch, length)` of a prompt, or its embeddings `(batch, length, hidden_size)`."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
