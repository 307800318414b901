"""
The plan for a prompt, made on the host: what its placeholders stand for, what of it a cache holds, and what goes.

A prompt holds T placeholders of each input (image or clip), as the stock processor writes, or N, as ours does. Its ids
are copied to the host once, before the tower is launched, and read there.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .cached_rows import follow_rows
from .prompts import ShortPrompt
from .readings import Reading, read_placeholders
from .upstream import CACHE_NAME


# The base model whose `generate` runs.
generating: ContextVar[Any] = ContextVar("generating", default=None)
# Whether the placeholders of the prompt that goes into upstream's next `forward` were counted at its entrance.
is_counted: ContextVar[bool] = ContextVar("is_counted", default=False)
# Integers as wide as floats of so many bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of any shapes and types, copied to the host at once, bit by bit."""
    away = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "cpu"}
    if not away or torch.compiler.is_compiling():
        return tensors
    bits = {
        name: tensor.view(_BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor
        for name, tensor in away.items()
    }
    device = next(iter(bits.values())).device
    flat = torch.cat([tensor.to(device).long().flatten() for tensor in bits.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in bits.values()])
    found = {
        name: part.view(tensor.shape).to(tensor.dtype).view(away[name].dtype)
        for (name, tensor), part in zip(bits.items(), parts)
    }
    return {**tensors, **found}


@dataclass
class CachedPrompt:
    """
    The prompt that filled a cache: its caller's ids `(batch, full_length)`, if known, and how it was shortened.
    Columns that another call put into the cache have the id -1.
    """

    input_ids: torch.LongTensor | None
    prompt: ShortPrompt

    def remember(self, cache: Any) -> None:
        """Leave this on a cache, for the calls that go on with it, behind what the cache remembers already."""
        if cache is not None:
            cache._prunesid_prompt = self._behind(cache)
            follow_rows(cache)

    def __len__(self) -> int:
        return len(self.prompt.source)

    def take_rows(self, rows: torch.LongTensor) -> "CachedPrompt":
        """The `rows`, known on the host."""
        input_ids = self.input_ids
        if input_ids is not None:
            input_ids = input_ids.index_select(0, rows.to(input_ids.device, non_blocking=True))
        return CachedPrompt(input_ids, self.prompt.take_rows(rows))

    def _behind(self, cache: Any) -> "CachedPrompt":
        held, batch, device = self.prompt.cached_before, len(self.prompt.source), self.prompt.source.device
        if not held:
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
        rows = len(cached)
        if not rows or batch % rows:
            raise ValueError(
                f"{CACHE_NAME} was filled by {rows} rows and is continued by {batch}, so that it is unknown what "
                "was dropped from which. Pass a multiple of its rows, or start from an empty cache."
            )
        times = batch // rows
        return cached if times == 1 else cached.take_rows(torch.arange(rows).repeat_interleave(times))

    def compare(self, input_ids: torch.LongTensor | None) -> dict[str, torch.BoolTensor]:
        """Whether `input_ids` `(batch, length)` begin with this prompt (`starts`), or its short form (`follows`)."""
        if self.input_ids is None or input_ids is None:
            return {}
        own = self.input_ids.to(input_ids.device)
        flags = {}
        for name, expected in (("starts", own), ("follows", self.prompt.take(own, fill=-1))):
            length = expected.shape[1]
            if input_ids.shape[1] >= length:
                flags[name] = ((input_ids[:, :length] == expected) | (expected < 0)).all()
        return flags


@dataclass
class Plan:
    """
    What is read of a prompt on the host.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*).
        placeholders (`dict[str, torch.BoolTensor]`): of each modality, `(batch, length)`.
        mask (`torch.BoolTensor` of shape `(batch, cached + length)`, *optional*): a flat attention mask.
        labels (`dict[str, torch.BoolTensor]`): which columns of `labels` and `shift_labels` have one.
        question (`torch.BoolTensor` of shape `(batch, length)`, *optional*): which columns are words of a question.
        sizes (`dict[str, torch.Tensor]`): `image_grid_thw`, `video_grid_thw` and `image_sizes`, where they are given.
        earlier ([`CachedPrompt`], *optional*), cached_length (`int`): what fills the cache.
        repeats_cached (`bool`): `input_ids` begin with what the cache holds, as those of `generate` do.
        start (`int`): how many columns were shortened with the cache.
        seen (`int`): how many columns are in the cache. Those behind `start` are its answer, where the id of a
            placeholder is a word.
        readings (`dict[str, Reading]`): how the placeholders of each modality were read.
    """

    input_ids: torch.LongTensor | None = None
    placeholders: dict[str, torch.BoolTensor] = field(default_factory=dict)
    mask: torch.BoolTensor | None = None
    labels: dict[str, torch.BoolTensor] = field(default_factory=dict)
    question: torch.BoolTensor | None = None
    sizes: dict[str, torch.Tensor] = field(default_factory=dict)
    earlier: CachedPrompt | None = None
    cached_length: int = 0
    repeats_cached: bool = False
    start: int = 0
    seen: int = 0
    is_known: bool = True
    readings: dict[str, Reading | None] = field(default_factory=dict)

    @classmethod
    def behind(cls, cached: CachedPrompt | None, cached_length: int, repeats_cached: bool, host: dict) -> "Plan":
        """A plan from tensors on the `host`: `ids`, `mask`, `labels`, `shift_labels`, and those of `compare`."""
        labels = {name: host[name] for name in ("labels", "shift_labels") if name in host}
        plan = cls(host.get("ids"), {}, host.get("mask"), labels, host.get("question"))
        plan.earlier, plan.cached_length, plan.repeats_cached = cached, cached_length, repeats_cached
        plan.seen = cached_length if repeats_cached else 0
        if cached is not None and repeats_cached:
            starts = "starts" in host and bool(host["starts"])
            is_compared = cached.input_ids is not None and plan.input_ids is not None
            plan.is_known = not is_compared or starts or ("follows" in host and bool(host["follows"]))
            if starts:
                plan.start = cached.prompt.full_length
                plan.seen = plan.start + max(cached_length - cached.prompt.length, 0)
        return plan

    def check_cache(self) -> None:
        """Raise a `ValueError` if the whole conversation does not begin with what filled the cache."""
        if not self.is_known:
            raise ValueError(
                f"{CACHE_NAME} was filled by another prompt than input_ids begin with. Pass the whole conversation "
                "of the cache, or an empty cache."
            )

    @property
    def current_mask(self) -> torch.BoolTensor | None:
        """The mask `(batch, length)` of the prompt's own columns."""
        length = next(iter(self.placeholders.values())).shape[1] if self.placeholders else 0
        return self.mask[:, -length:] if self.mask is not None and length else self.mask

    def of(self, modalities: Any) -> torch.BoolTensor:
        """The placeholders `(batch, length)` of several modalities."""
        return torch.stack([self.placeholders[name] for name in modalities]).any(0)

    @property
    def is_labelled(self) -> torch.BoolTensor | None:
        """Which columns have a label or predict one: the loss counts padding that is labelled."""
        is_labelled = None
        for name, labels in self.labels.items():
            own = torch.nn.functional.pad(labels[:, :-1], (1, 0)) if name == "shift_labels" else labels
            own = own | torch.nn.functional.pad(own[:, 1:], (0, 1))
            is_labelled = own if is_labelled is None else is_labelled | own
        return is_labelled

    @property
    def is_right_padded(self) -> bool:
        """Whether rows of the batch are padded on the right alone."""
        mask = self.current_mask
        return mask is not None and bool(mask[:, 0].all()) and not bool(mask[:, -1].all())

    def padding(self, modalities: Any, leading_only: bool) -> torch.BoolTensor | None:
        """
        The columns `(batch, length)` before the first and after the last token of each row that give way to added
        padding: no placeholders, and nothing that the loss counts. None where columns of the prompt are cached.
        """
        mask = self.current_mask
        if mask is None or (self.repeats_cached and self.cached_length):
            return None
        padding = mask.cumsum(1) == 0
        padding = padding if leading_only else padding | (mask.flip(1).cumsum(1) == 0).flip(1)
        padding = padding & ~self.of(modalities)
        return padding if self.is_labelled is None else padding & ~self.is_labelled

    def without_answer(self, placeholders: torch.BoolTensor) -> torch.BoolTensor:
        """
        The placeholders but for ids in the answer to an earlier prompt, which are words: the columns from `start` to
        `seen`, that are in its cache, and a last one that is not.
        """
        if not self.start:
            return placeholders
        is_answer = torch.zeros_like(placeholders)
        is_answer[:, self.start : self.seen] = True
        alone = placeholders & ~torch.nn.functional.pad(placeholders[:, 1:], (0, 1))
        is_answer[:, self.seen : self.seen + 1] = alone[:, self.seen : self.seen + 1]
        return placeholders & ~is_answer

    def read(
        self,
        modality: str,
        num_placeholders: list[int],
        num_kept: list[int],
        is_stated: bool,
        short_runs: Callable[[], list[list[int]] | None] = lambda: None,
    ) -> Reading | None:
        """
        How the placeholders of `modality` are to be read: `read_placeholders`, behind a cache. None where they remain.

        Raises:
            `ValueError`: if columns would go that are in a cache, where they were not shortened.
        """
        placeholders, new = self.placeholders[modality], None
        if self.seen:
            placeholders = self.without_answer(placeholders)
            # Either the views of the whole conversation are passed again, or the new ones alone.
            new = placeholders & (torch.arange(placeholders.shape[1]) >= self.seen)
        reading = read_placeholders(
            placeholders, num_placeholders, num_kept, modality, new, self.current_mask, is_stated, short_runs
        )
        self.readings[modality] = reading
        if reading is None or not reading.shortens:
            return None
        if reading.drops_between(self.start, self.seen, num_kept):
            raise ValueError(
                f"{CACHE_NAME} was filled by another prompt: input_ids have every placeholder of views in the "
                "cache, which were not shortened there. Pass the cache that belongs to the conversation, or an "
                "empty one."
            )
        return reading

    def labels_of_placeholders(self, modalities: Any) -> dict[str, tuple[torch.BoolTensor, torch.BoolTensor]]:
        """
        Of each kind of labels, the columns `(batch, length)` whose labels are ignored because they are placeholders,
        and those that have a label which a loss may count.
        """
        found: dict[str, tuple[torch.BoolTensor, torch.BoolTensor]] = {}
        for name, given in self.labels.items():
            placeholders = self.of(modalities)
            if name == "shift_labels":
                found[name] = torch.nn.functional.pad(placeholders[:, 1:], (0, 1), value=False), given
            else:  # nothing predicts the first column, unless padding is added before it
                is_first = torch.nn.functional.pad(torch.ones_like(given[:, :1]), (0, given.shape[1] - 1), value=False)
                found[name] = placeholders | is_first, given & ~is_first
        return found
