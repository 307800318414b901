"""DART, duplication-aware reduction of tokens, https://arxiv.org/abs/2502.11494.

In front of layer 2 of 32 the 4 visual tokens and the 4 text tokens behind them whose keys of the layer before have the
largest L1 norm, rotated for their positions as the cache holds them, become pivots. Each pivot in turn takes the
visual tokens least similar to it, the same number each.

Similarity is the cosine of hidden states behind the decoder's last norm. 4 + 8 * k visual tokens stay, in order and
with their original positions: with that whole number k they come closest to what FastV keeps in the same place. A
prompt of fewer text tokens has fewer pivots. The layer scales with the depth of the language model.
"""

import torch

from .llm import Row, count_behind


LAYER = 2
PIVOTS = 4


def plan(budget: int, patches: int) -> dict[int, int]:
    """How many visual tokens of an image stay behind the layer, about."""
    return {LAYER: count_behind(LAYER, budget, patches)}


def choose(row: Row, setting: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Args:
        row (`Row`): for its rotated keys and hidden states.
        setting (`int`): how many visual tokens of an image stay, about.
    """
    norms = row.rotated_keys.float().flatten(1).abs().sum(1)
    images, texts = (largest(norms, places) for places in (row.visual, row.text))
    units = torch.nn.functional.normalize(row.normed.float(), dim=-1)
    each = max(round((setting * row.num_images - PIVOTS) / (2 * PIVOTS)), 0)
    pool = row.visual[~torch.isin(row.visual, images)]
    kept = [images]
    for pivot in torch.cat([images, texts]):
        order = (units[pool] @ units[pivot]).argsort(stable=True)
        kept.append(pool[order[:each]])
        pool = pool[order[each:].sort().values]
    return row.keep(torch.cat(kept).sort().values)


def largest(norms: torch.Tensor, places: torch.LongTensor) -> torch.LongTensor:
    """The pivots among `places`, that of the largest norm first."""
    return places[norms[places].argsort(descending=True, stable=True)[:PIVOTS]]
