"""FastV, an image is worth half the tokens behind layer 2, https://arxiv.org/abs/2403.06764.

In front of layer K = 2 of 32 the visual tokens are ranked by the attention that the last token of the prompt pays them
in the layer before, mean over heads. The best stay in order, with their original positions.

Only that row of the attention is computed, from queries and keys, so that any attention implementation works. K scales
with the depth of the language model; the tokens behind it are those that make the mean N in 32 layers.
"""

import torch

from modeling_prunesid.single_views import highest

from .llm import Row, count_behind


LAYER = 2


def plan(budget: int, patches: int) -> dict[int, int]:
    """How many visual tokens of an image stay behind the layer."""
    return {LAYER: count_behind(LAYER, budget, patches)}


def choose(row: Row, setting: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Args:
        row (`Row`): for its attention.
        setting (`int`): how many visual tokens of an image stay.
    """
    attention = row.attention(row.readers[-1:])[0]
    return row.keep(row.visual[highest(attention[row.visual], setting * row.num_images)])
