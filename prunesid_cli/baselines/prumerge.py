"""LLaVA-PruMerge, pruning and merging, https://arxiv.org/abs/2403.15388.

The patches that the CLS token attends to most are kept, each with the attention-weighted sum of its nearest others
added, and one token more is the attention-weighted sum of all that are not kept. PruMerge+ keeps evenly strided
patches besides.

Attention is that of the tower's last layer, its heads taken as one. The budget is fixed here: the adaptive count of
the paper is not used, and N counts the last token, so that N - 1 patches are kept. Of these PruMerge+ takes half by
attention, rounded up, and half evenly from the others. Patches are in raster order, the merged token comes last.
"""

import torch

from .encoder import Kept, View, top


NEAREST = 32


def choose(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its queries and keys.
        budget (`int`): N.
    """
    attention = cls_attention_of_joined_heads(view)
    return merge(view, attention, top(attention, budget - 1))


def choose_plus(view: View, budget: int) -> Kept:
    """
    Args:
        view (`View`): for its queries and keys.
        budget (`int`): N.
    """
    attention = cls_attention_of_joined_heads(view)
    by_attention = top(attention, budget // 2)
    others = _all_but(by_attention, len(attention))
    count = budget - 1 - len(by_attention)
    strided = others[torch.arange(count, device=others.device) * len(others) // max(count, 1)]
    return merge(view, attention, torch.cat([by_attention, strided]).sort().values)


def cls_attention_of_joined_heads(view: View) -> torch.Tensor:
    """softmax(q k^T / sqrt(width)) of the CLS query over all tokens: the share of each patch, `(T,)`."""
    logits = view.keys.float() @ view.queries[0].float() / view.keys.shape[1] ** 0.5
    return logits.softmax(0)[-len(view.features) :]


def merge(view: View, attention: torch.Tensor, kept: torch.LongTensor) -> Kept:
    """The `kept` patches, each with its nearest others by the cosine of keys, and the token of the rest."""
    features = view.features.float()
    keys = torch.nn.functional.normalize(view.patch_keys.float(), dim=-1)
    similarity = (keys[kept] @ keys.T).scatter(1, kept[:, None], -torch.inf)
    nearest = similarity.topk(min(NEAREST, len(features) - 1)).indices
    weighted = attention[:, None] * features
    merged = features[kept] + weighted[nearest].sum(1)
    rest = weighted[_all_but(kept, len(features))].sum(0, keepdim=True)
    return Kept(torch.cat([merged, rest]).to(view.features.dtype), torch.cat([kept, kept.new_tensor([-1])]))


def _all_but(indices: torch.LongTensor, count: int) -> torch.LongTensor:
    others = torch.ones(count, dtype=torch.bool, device=indices.device)
    others[indices] = False
    return others.nonzero()[:, 0]
