"""The attention that the CLS token of a vision tower pays in one layer, read while upstream's own encoder runs."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from .layers import has_cls
from .tower import hooked, layers_of


_INSTEAD = "Use PruneSID with method='paper', or method_settings={'score': 'component'}."
# What attention modules call their query and key projections: CLIP and SigLIP, DINOv2.
_PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"))


def check_has_cls(tower: nn.Module) -> None:
    if not has_cls(tower):
        raise ValueError(
            "ViTCoP, and methods that rank tokens by CLS attention, need a vision tower with a CLS token, which "
            f"{type(tower).__name__} lacks. {_INSTEAD}"
        )


@contextmanager
def watch_cls(tower: nn.Module, layer: int):
    """
    While upstream runs a tower, reads the queries and keys of one of its layers.

    Args:
        tower (`nn.Module`): a vision tower of Transformers.
        layer (`int`): the index of the hidden states that the layer gives.

    Yields:
        `list[torch.Tensor]`, which is filled with queries and keys `(batch, tokens, dim)`, the heads side by side.

    Raises:
        `ValueError`: for a tower without a CLS token, for the embeddings, or a layer without such projections.
    """
    check_has_cls(tower)
    if layer == 0:
        raise ValueError(
            "prunesid_config.layer=0 (or vitcop_config.layer=0) are the embeddings, which have no attention. Name a "
            "later layer. " + _INSTEAD
        )
    block = layers_of(tower)[layer - 1]
    modules = dict(block.named_modules())
    by_suffix = {name.rsplit(".", 1)[-1]: module for name, module in modules.items()}
    names = next((pair for pair in _PROJECTIONS if all(name in by_suffix for name in pair)), None)
    if names is None:
        raise ValueError(
            "ViTCoP, and methods that rank tokens by CLS attention, need separate query and key projections, which "
            f"{type(block).__name__} lacks. {_INSTEAD}"
        )
    captured: list[torch.Tensor] = []
    with hooked(by_suffix[names[0]], captured.append), hooked(by_suffix[names[1]], captured.append):
        yield captured


def cls_attention(queries: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Softmax of the first query over all keys `(batch, tokens, dim)`, summed over the heads: `(batch, tokens)`."""
    batch, tokens, dim = keys.shape
    query = queries[:, :1].reshape(batch, 1, num_heads, -1).transpose(1, 2)
    keys = keys.reshape(batch, tokens, num_heads, -1).transpose(1, 2)
    with torch.autocast(queries.device.type, enabled=False):
        logits = query @ keys.transpose(-1, -2) * (dim // num_heads) ** -0.5
        return logits.float().softmax(-1).sum((1, 2))


def read_cls(name: str, queries: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What `methods.OF_CLS` names: attention `(batch, tokens)`, or keys `(batch, tokens, heads, any dim)`."""
    if name == "keys":
        return keys.unflatten(-1, (num_heads, -1))
    return cls_attention(queries, keys, num_heads if name == "cls_attention" else 1)


# What the model's code reads CLS by; see `parts.py`.
PARTS = SimpleNamespace(check=check_has_cls, watch=watch_cls, read=read_cls)
