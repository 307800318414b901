"""The attention that the CLS token of a vision tower pays in one layer, read while upstream's own encoder runs."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from .layers import has_cls
from .tower import hooked, layers_of


_INSTEAD = "Use PruneSID with method='paper', or method_settings={'score': 'component'}."
# What attention modules call their query and key projections: CLIP and SigLIP, DINOv2.
_PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"))


@dataclass
class Projections:
    """
    What the projections of a layer gave.

    Args:
        num_heads (`int`): of the tower.
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`): the heads side by side, when the tower has run.
    """

    num_heads: int
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @property
    def cls_attention(self) -> torch.Tensor:
        """The attention weights `(batch, tokens)` of the CLS query, summed over the heads, in float32."""
        return attend(self.queries, self.keys, self.num_heads)

    @property
    def joined_attention(self) -> torch.Tensor:
        """The attention weights `(batch, tokens)` of the CLS query with all heads taken as one, in float32."""
        return attend(self.queries, self.keys, num_heads=1)


def check_has_cls(tower: nn.Module) -> None:
    """Raise a `ValueError` for a tower without a CLS token."""
    if not has_cls(tower):
        raise ValueError(
            "ViTCoP, and methods that rank tokens by CLS attention, need a vision tower with a CLS token, which "
            f"{type(tower).__name__} lacks. {_INSTEAD}"
        )


@contextmanager
def watch_cls(tower: nn.Module, layer: int):
    """
    While upstream runs a tower, reads the queries and keys of one layer.

    Args:
        tower (`nn.Module`): a vision tower of Transformers.
        layer (`int`): the hidden state that the layer gives, as a non-negative index.

    Yields:
        [`Projections`].

    Raises:
        `ValueError`: for a tower without a CLS token, for the embeddings, or for a layer without query and key
            projections.
    """
    check_has_cls(tower)
    if layer == 0:
        raise ValueError(
            "prunesid_config.layer=0 (or vitcop_config.layer=0) are the embeddings, which have no attention. Name a "
            "later layer. " + _INSTEAD
        )
    block = layers_of(tower)[layer - 1]
    by_suffix = {name.rsplit(".", 1)[-1]: module for name, module in block.named_modules()}
    names = next((pair for pair in _PROJECTIONS if all(name in by_suffix for name in pair)), None)
    if names is None:
        raise ValueError(
            "ViTCoP, and methods that rank tokens by CLS attention, need separate query and key projections, which "
            f"{type(block).__name__} lacks. {_INSTEAD}"
        )
    found = Projections(tower.config.num_attention_heads)
    with (
        hooked(by_suffix[names[0]], lambda value: setattr(found, "queries", value)),
        hooked(by_suffix[names[1]], lambda value: setattr(found, "keys", value)),
    ):
        yield found


def attend(queries: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Softmax of the first query over all keys `(batch, tokens, dim)`, summed over the heads: `(batch, tokens)`."""
    batch, tokens, dim = keys.shape
    query = queries[:, :1].reshape(batch, 1, num_heads, -1).transpose(1, 2)
    keys = keys.reshape(batch, tokens, num_heads, -1).transpose(1, 2)
    with torch.autocast(queries.device.type, enabled=False):
        logits = query @ keys.transpose(-1, -2) * (dim // num_heads) ** -0.5
        return logits.float().softmax(-1).sum((1, 2))


# What the model's code reads CLS by; a repository whose method reads none goes without this file.
PARTS = SimpleNamespace(check=check_has_cls, watch=watch_cls)
