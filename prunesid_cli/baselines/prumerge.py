"""LLaVA-PruMerge, pruning and merging, https://arxiv.org/abs/2403.15388.

The patches that the CLS token attends to most are kept, each with the attention-weighted sum of its nearest others
added, and one token more is the attention-weighted sum of all that are not kept. PruMerge+ keeps evenly strided
patches besides.

Attention is that of the tower's last layer (`layer=-1`), its heads taken as one. The budget is fixed here: the
adaptive count of the paper is not used, and N counts the last token, so that N - 1 patches are kept. Of these
PruMerge+ (`strided`) takes half by attention, rounded up, and half evenly from the others. All are in raster order,
the token of those that are not kept in the place of the last of these; in the release it comes last.
"""

from typing import Any

import torch

from modeling_prunesid.context import Context
from modeling_prunesid.single_views import highest, view_by_view


NEAREST = 32

DEFAULTS = {"strided": False}
RULES = {"strided": (lambda value: isinstance(value, bool), "True or False")}


def needs(method_settings: dict) -> frozenset[str]:
    """What of a [`Context`] is read."""
    return frozenset({"joined_attention", "keys", "features"})


@view_by_view
def select(view: torch.Tensor, count: int, settings: Any, context: Context) -> tuple[torch.LongTensor, torch.Tensor]:
    """Ascending indices `(count,)` of the tokens to keep of a view `(T, dim)`, and their features."""
    options = DEFAULTS | (settings.method_settings or {})
    attention: Any = context.joined_attention
    kept = highest(attention, count // 2 if options["strided"] else count - 1)
    if len(kept) < count - 1:
        others, missing = _all_but(kept, len(attention)), count - 1 - len(kept)
        strided = others[torch.arange(missing, device=others.device) * len(others) // missing]
        kept = torch.cat([kept, strided]).sort().values
    return merge(context, kept)


def merge(context: Context, kept: torch.LongTensor) -> tuple[torch.LongTensor, torch.Tensor]:
    """The `kept` patches, each with its nearest others by the cosine of keys, and the token of the rest."""
    features, attention = context.features.float(), context.joined_attention
    keys = torch.nn.functional.normalize(context.keys.flatten(1).float(), dim=-1)
    similarity = (keys[kept] @ keys.T).scatter(1, kept[:, None], -torch.inf)
    nearest = similarity.topk(min(NEAREST, len(features) - 1)).indices
    weighted = attention[:, None] * features
    others = _all_but(kept, len(features))
    merged = torch.cat([features[kept] + weighted[nearest].sum(1), weighted[others].sum(0, keepdim=True)])
    indices, order = torch.cat([kept, others[-1:]]).sort()
    return indices, merged[order].to(context.features.dtype)


def _all_but(indices: torch.LongTensor, count: int) -> torch.LongTensor:
    others = torch.ones(count, dtype=torch.bool, device=indices.device)
    others[indices] = False
    return others.nonzero()[:, 0]
