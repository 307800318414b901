"""A vision tower whose work on pictures is not repeated while several methods read the same pictures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def remembered(tower: nn.Module) -> Iterator[None]:
    """Within, the tower's embeddings and layers return what they returned before where they are given the same again.

    Nothing is approximated: inputs are compared value by value, and a layer that is watched from within (hooks on its
    queries or keys) runs again. All results are kept until the end. The tower must be in evaluation mode and get no
    mask.
    """
    assert not tower.training
    depth = tower.config.num_hidden_layers
    layers = next(module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    embeddings = next(module for name, module in tower.named_modules() if name.rsplit(".", 1)[-1] == "embeddings")
    modules = [embeddings, *layers]
    for module in modules:
        module.forward = _recalling(module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own again


def _recalling(module: nn.Module, forward: Callable) -> Callable:
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recall(given: torch.Tensor, *arguments, **options):
        if not _is_watched_within(module):
            for known, returned in results:
                if given is known or (given.shape == known.shape and torch.equal(given, known)):
                    return returned
        results.append((given, forward(given, *arguments, **options)))
        return results[-1][1]

    return recall


def _is_watched_within(module: nn.Module) -> bool:
    """Whether a part of `module` has hooks, other than those by which Transformers collects outputs on request."""
    parts = [part for part in module.modules() if part is not module]
    hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
