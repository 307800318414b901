"""Upstream's `forward` on a short prompt, whose logits and hidden states get the columns of the caller's prompt."""

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers.utils import ModelOutput

from .plans import CachedPrompt, is_counted
from .prompts import ShortPrompt, gather_columns
from .upstream import cache_of


def run_shortened(
    model: Any,
    forward: Callable,
    inputs: dict[str, Any],
    input_ids: torch.LongTensor | None,
    prompt: ShortPrompt | None,
) -> Any:
    """
    Upstream's `forward` of a `model` on shortened arguments. Its logits and hidden states get the columns of the
    caller's prompt `input_ids`; a tuple, where one is asked for, has what the stock class returns.
    """
    if prompt is None and (torch.compiler.is_compiling() or not is_counted.get()):
        return forward(**inputs)
    if prompt is None:
        try:
            return forward(**inputs)
        finally:
            is_counted.set(False)
    inputs = dict(inputs)
    return_dict, keep = inputs.pop("return_dict", None), inputs.pop("logits_to_keep", 0)
    keep, places = _without_mask(keep if getattr(model, "reads_logits_to_keep", False) else 0)
    columns = prompt.callers_columns()
    needed, wanted = _logits_to_keep(model, prompt, columns, keep)
    if needed is not None:
        inputs["logits_to_keep"] = needed
    try:
        output = forward(**inputs, return_dict=True)
    finally:
        if not torch.compiler.is_compiling():
            is_counted.set(False)
    CachedPrompt(input_ids, prompt).remember(cache_of(output))
    if output.get("logits") is not None:
        output["logits"] = gather_columns(output["logits"], wanted)
        if places is not None:
            output["logits"] = output["logits"][places]
    if output.get("last_hidden_state") is not None:
        output["last_hidden_state"] = gather_columns(output["last_hidden_state"], columns)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(
            state if state is None else gather_columns(state, columns) for state in output["hidden_states"]
        )
    if not (model.config.return_dict if return_dict is None else return_dict):
        names = [field.name for field in fields(output) if output.get(field.name) is not None]
        values = [output[name] for name in names if name not in getattr(model, "not_in_tuples", ())]
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)
    output["keep_mask"] = prompt.keep_mask
    return output


def _logits_to_keep(
    model: Any, prompt: ShortPrompt, columns: torch.LongTensor, keep: int | torch.Tensor
) -> tuple[Any, torch.LongTensor]:
    """
    What a head is to be asked for in place of the `logits_to_keep` of a caller's prompt, None for nothing, and where
    in that the caller's columns are. `columns` `(batch, full_length)` are those of `ShortPrompt.callers_columns`.
    """
    wanted = _select(columns, keep)
    if isinstance(keep, int) and keep > 0:  # the caller's last columns carry no earlier ones of the short prompt
        needed = min(keep + prompt.added_behind + 1, prompt.length)
        return needed, wanted - (prompt.length - needed)
    if wanted is columns:
        return None, wanted
    if len(wanted) == 1:
        return wanted[0], torch.arange(wanted.shape[1], device=wanted.device)[None]
    if _takes_rows(model):
        return wanted, torch.arange(wanted.shape[1], device=wanted.device).expand_as(wanted)
    return wanted.unique(return_inverse=True)  # of all rows, for which the device is waited for


def _takes_rows(model: Any) -> bool:
    """Whether upstream's head takes other `logits_to_keep` for each row, as it may from 5.23 on."""
    modules = {base.__module__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")}
    return any(hasattr(sys.modules[module], "slice_logits_to_keep") for module in modules)


def _select(columns: torch.LongTensor, keep: int | torch.Tensor) -> torch.LongTensor:
    """Of `columns` `(batch, length)` those that `logits_to_keep` asks for, in the forms that upstream takes."""
    if isinstance(keep, int):
        return columns[:, -keep:] if keep else columns
    if isinstance(keep, torch.Tensor):
        keep = keep.to(columns.device, non_blocking=True)
        if keep.dim() == 2:
            return columns.gather(1, keep % columns.shape[1])
    return columns[:, keep]


def _without_mask(keep: int | torch.Tensor) -> tuple[Any, tuple[torch.LongTensor, torch.LongTensor] | None]:
    """
    A mask `(batch, length)` of `logits_to_keep` as as many columns of each row, read on the host, and where in their
    logits the marked ones are, row by row. All else as it is, and None.
    """
    if not isinstance(keep, torch.Tensor) or keep.dim() != 2 or keep.dtype != torch.bool:
        return keep, None
    mask = keep.cpu()
    counts = mask.sum(1, keepdim=True)
    most = max(int(counts.max()), 1)
    columns = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    rows, places = (torch.arange(most) < counts).nonzero(as_tuple=True)
    columns, rows, places = (part.to(keep.device, non_blocking=True) for part in (columns, rows, places))
    return columns, (rows, places)
