"""What every method of choosing tokens gets and gives: `select(views, counts, settings, context) -> Selection`."""

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from .exact import is_batched, without_autocast


VIEWS_AT_ONCE = 32
# What a context has of each token.
TENSORS = ("attention", "joined_attention", "projected", "keys", "features", "relevance")


@dataclass
class Context:
    """
    What a method may look at beside the tokens that it compares.

    Attributes:
        counts (`list[int]`, *optional*): N of each view on the host; without them `max_count` is needed.
        max_count (`int`): the largest N, where `counts` are None.
        lengths (`list[int]`, *optional*): T of each view, where views are padded behind their own tokens.
        extra_kept (`int`): tokens kept besides, which count in the N of K, of lambda and of the bounds.
        lambda_of_share (`bool`): `nms_lambda=None` means 18 * N / T in place of N / 32.
        attention (`torch.Tensor` of shape `(views, tokens)`, *optional*):
            The attention that each token receives, of CLS (summed over heads) or of all tokens alike.
        joined_attention (`torch.Tensor` of shape `(views, tokens)`, *optional*):
            That of CLS with the heads taken as one.
        keys (`torch.Tensor` of shape `(views, tokens, heads, any dim)`, *optional*): the tower's keys.
        projected (`torch.Tensor` of shape `(views, tokens, hidden_size)`, *optional*):
            The tokens as the language model gets them; None where the views are these.
        features (`torch.Tensor` of shape `(views, tokens, any dim)`, *optional*):
            The rows that `Selection.merged` replaces; None where the views are these.
        relevance (`torch.FloatTensor` of shape `(views, tokens)`, *optional*):
            In [0, 1]: how near each token is to the question of its prompt, see `question.py`.
        details (`bool`): also return groups and scores.
    """

    counts: list[int] | None = None
    max_count: int = 0
    lengths: list[int] | None = None
    extra_kept: int = 0
    lambda_of_share: bool = False
    attention: torch.Tensor | None = None
    joined_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    features: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    details: bool = False

    def of_views(self, first: int, last: int, tokens: int) -> "Context":
        """The same of views `first` to `last`, and of their leading `tokens` alone."""

        own: dict[str, Any] = {name: getattr(self, name) for name in ("counts", "lengths", *TENSORS)}
        own = {name: value[first:last] for name, value in own.items() if value is not None}
        return replace(self, **{name: value[:, :tokens] if name in TENSORS else value for name, value in own.items()})


# Where `explain` listens: a list that takes each selection, its views and context, which of all views these are, and
# N and T of all views. None: nobody does.
SELECTIONS: ContextVar[list | None] = ContextVar("selections", default=None)

# What the prompt asks while its views are encoded, a `Question`. None: nothing reads it.
ASKED: ContextVar[Any] = ContextVar("asked", default=None)


@dataclass
class Selection:
    """
    The tokens that a method keeps.

    Attributes:
        indices (`torch.LongTensor` of shape `(views, largest N)`):
            Kept tokens of each view, ascending; shorter rows end in `tokens`, one past the last token.
        counts (`torch.LongTensor` of shape `(views,)`): number of tokens kept of each view.
        rho (`torch.FloatTensor` of shape `(views,)`, *optional*): redundancy of each view, equation 4.
        groups (`torch.LongTensor` of shape `(views, tokens)`, *optional*): equation 3; -1 for a non-finite token.
        scores (`torch.FloatTensor` of shape `(views, tokens)`, *optional*): -inf for a non-finite token.
        merged (`torch.Tensor` of shape `(views, largest N, any dim)`, *optional*):
            Features in place of those of the kept tokens, of methods that merge.
    """

    indices: torch.LongTensor
    counts: torch.LongTensor
    rho: torch.FloatTensor | None = None
    groups: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    merged: torch.Tensor | None = None

    @property
    def mask(self) -> torch.BoolTensor:
        """Which of `indices` are tokens."""
        return torch.arange(self.indices.shape[1], device=self.indices.device) < self.counts[:, None]


# `method_settings["question"]` of the methods that read it.
QUESTION_RULE = (lambda value: value is True or value is False or value == "keep", "False, True or 'keep'")


def needs_of_settings(method_settings: dict) -> frozenset[str]:
    """What `question` and `grouping` need: tensors of a [`Context`], and the code of `grouping.py`."""
    asked = {"projected", "relevance"} if method_settings.get("question") else set()
    return frozenset(asked | ({"grouping"} if method_settings.get("grouping", "psca") != "psca" else set()))


def counts_on(device: torch.device, counts: list[int]) -> torch.LongTensor:
    """The counts on a device, without a wait for it."""
    if len(set(counts)) == 1:
        return torch.full((len(counts),), counts[0], device=device)
    return torch.tensor(counts).to(device, non_blocking=True)


def in_parts(select: Callable) -> Callable:
    """Makes a method's function take a few views at a time: one on a CPU, without its padding, and 32 elsewhere."""

    @functools.wraps(select)
    @torch.no_grad()
    def run(views: torch.Tensor, counts: torch.Tensor, settings: Any, context: Context) -> Selection:
        batch, tokens, _ = views.shape
        with without_autocast(views.device):
            if torch.compiler.is_compiling():
                return select(views, counts, settings, context)
            size = VIEWS_AT_ONCE if is_batched(views) else 1
            if size == 1 and context.counts is None:
                context = replace(context, counts=counts.tolist())
            parts = []
            for first in range(0, batch, size):
                last = min(first + size, batch)
                length = tokens if context.lengths is None else max(context.lengths[first:last])
                part = context.of_views(first, last, length)
                parts.append(select(views[first:last, :length], counts[first:last], settings, part))
        if len(parts) == 1 and length == tokens:
            return parts[0]
        return _joined(parts, tokens, context.details)

    return run


def _joined(parts: list[Selection], tokens: int, details: bool) -> Selection:
    """The parts of a batch as one, their rows padded to the longest."""

    def whole(name: str, columns: int | None = None, value: float = 0):
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        if columns is not None:
            rest = (0,) * (2 * tensors[0].dim() - 4)
            tensors = [
                t
                if t.shape[1] == columns
                else torch.nn.functional.pad(t, (*rest, 0, columns - t.shape[1]), value=value)
                for t in tensors
            ]
        return torch.cat(tensors)

    most = max(part.indices.shape[1] for part in parts)
    out = Selection(
        whole("indices", most),
        whole("counts"),
        whole("rho"),
        whole("groups", tokens, -1),
        whole("scores", tokens, -math.inf),
        whole("merged", most),
    )
    return replace(out, indices=out.indices.masked_fill(~out.mask, tokens))


def largest(context: Context) -> int:
    """The largest N."""
    return max(context.counts) if context.counts is not None else context.max_count


def are_equal(context: Context) -> bool:
    """Whether the host knows that all views keep the same number of tokens of the same length."""
    return context.counts is not None and len(set(context.counts)) == 1 == len(set(context.lengths or [0]))
