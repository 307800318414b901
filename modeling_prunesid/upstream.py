"""
What the installed Transformers, from 5.18 on, calls things that it has renamed.

The cache of keys and values is `past_key_values` up to 5.23 and `cache` from 5.24 on, as an argument of forwards and
layers, among the `model_kwargs` of `generate` and as a field of outputs. Everything here reads and writes it by the
installed name, which alone gives no warning. Callers pass either name where upstream takes both.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.output_capturing import maybe_install_capturing_hooks


_OLD_CACHE_NAME = "past_key_values"
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else _OLD_CACHE_NAME
CACHE_NAMES = (_OLD_CACHE_NAME, "cache")  # whichever a saved configuration will meet
# The pixels that each modality is encoded from, by the names that Transformers uses.
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
# What callers ask for by these names, of encoders as of language models.
SHOWN = ("output_hidden_states", "output_attentions")


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among arguments by their installed names, or in an output; None where there is none."""
    return values.get(CACHE_NAME)


def rename_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """A caller's arguments, with the cache by its installed name. Both names at once are left to upstream."""
    if CACHE_NAME == _OLD_CACHE_NAME or _OLD_CACHE_NAME not in arguments or CACHE_NAME in arguments:
        return arguments
    return {CACHE_NAME if name == _OLD_CACHE_NAME else name: value for name, value in arguments.items()}


@torch.compiler.assume_constant_result
def install_capturing(model: PreTrainedModel) -> bool:
    """What reads hidden states of `model`, put in when a graph is traced: upstream does so in a first run."""
    maybe_install_capturing_hooks(model)
    return True


def like_upstream(upstream: Callable, further: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """
    A decorator for a method `(self, *, ours=None, **inputs)` that overrides `upstream`. Callers see upstream's
    arguments, as the installed Transformers has them, with ours behind them, and pass them by place or by name; the
    method gets those that were passed, by their installed names. `further` names arguments of ours that the method
    takes among `inputs`.

    Raises:
        `TypeError`: from the decorated method, for more arguments by place than upstream takes, or one given twice.
    """
    signature = inspect.signature(upstream)
    theirs = list(signature.parameters.values())
    by_place = [parameter.name for parameter in theirs if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][1:]

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def named(self, *args, **kwargs):
            if len(args) > len(by_place):
                raise TypeError(f"{method.__qualname__} takes {len(by_place)} arguments by place, got {len(args)}.")
            return method(self, **dict(zip(by_place, args)), **rename_cache(kwargs))

        own = dict(inspect.signature(method).parameters)
        own |= {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in further}
        ours = [
            parameter
            for name, parameter in own.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in signature.parameters
        ]
        # `inspect` finds it behind `named`, whose own attributes Accelerate copies to a function without `self`.
        method.__signature__ = signature.replace(parameters=[*theirs[:-1], *ours, theirs[-1]])
        return named

    return decorate
