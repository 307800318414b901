"""Methods that look at one view at a time: the shortest way to write one. It travels with those alone."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .context import TENSORS, Context, Selection
from .exact import without_autocast


def highest(scores: torch.Tensor, count: int) -> torch.LongTensor:
    """The ascending indices of the `count` highest of the scores `(tokens,)`; of equal ones, the lower indices."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def view_by_view(choose: Callable) -> Callable:
    """
    Makes a method's `select` of a function of a single view.

    Args:
        choose (`Callable`):
            `choose(view, count, settings, context)` of the features `(T, dim)` of a view, its N < T as an int, and
            what `select` gets, the context's tensors without their first dimension. It returns N ascending indices; or
            a tuple of these and of features `(N, any dim)`, which take the place of those of the kept tokens.
    """

    @functools.wraps(choose)
    def select(views: torch.Tensor, counts: torch.Tensor, settings: Any, context: Context) -> Selection:
        batch, tokens, _ = views.shape
        numbers = counts.tolist() if context.counts is None else context.counts
        lengths = [tokens] * batch if context.lengths is None else context.lengths
        kept, merged = [], []
        with without_autocast(views.device):
            own: Any
            for row, (count, length) in enumerate(zip(numbers, lengths)):
                own = context.of_views(row, row + 1, length)
                tensors: dict[str, Any] = {name: getattr(own, name) for name in TENSORS}
                tensors = {name: None if value is None else value[0] for name, value in tensors.items()}
                own = replace(own, **tensors)
                chosen = choose(views[row, :length].detach(), count, settings, own)
                indices, features = chosen if isinstance(chosen, tuple) else (chosen, None)
                if indices.shape != (count,):
                    raise ValueError(
                        f"prunesid_config.method={settings.method!r} must choose {count} of {length} tokens, got "
                        f"indices of shape {tuple(indices.shape)}. Fix its `select`."
                    )
                kept.append(indices)
                merged += [] if features is None else [features]
        pad = torch.nn.utils.rnn.pad_sequence
        return Selection(
            pad(kept, batch_first=True, padding_value=tokens),
            counts,
            merged=pad(merged, batch_first=True) if merged else None,
        )

    return select
