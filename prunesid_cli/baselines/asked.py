"""PruneSID's own selection by the question, as a method to compare: callers need not say which words it is."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .encoder import replaced


def asking(install: Callable) -> Callable:
    """
    The context of `install`, in which prompts without a `question_mask` get one: all text behind the last image of
    each row, with what a chat template writes there. `prunesid evaluate` passes that of the question alone.
    """

    @contextmanager
    def context(model: Any, budget: int | float) -> Iterator[None]:
        stock = model.generate

        @functools.wraps(stock)
        def generate(inputs=None, **kwargs):
            kwargs = kwargs if inputs is None else {"input_ids": inputs, **kwargs}
            return stock(**_with_mask(model, kwargs))

        def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            named = {"input_ids": args[0], **kwargs} if args else kwargs
            return args, {**kwargs, **_with_mask(model, named, adds_only=True)}

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with install(model, budget), replaced(model, "generate", generate):
                yield
        finally:
            handle.remove()

    return context


def _with_mask(model: Any, given: dict[str, Any], adds_only: bool = False) -> dict[str, Any]:
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    added = {}
    if given.get("pixel_values") is not None and ids is not None and given.get("question_mask") is None:
        is_behind = (ids == model.config.image_token_id).flip(1).cumsum(1).flip(1) == 0
        added = {"question_mask": (is_behind if mask is None else is_behind & (mask != 0)).to(torch.long)}
    return added if adds_only else {**given, **added}
