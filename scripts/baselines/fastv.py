"""FastV, an image is worth half the tokens behind layer 2, https://arxiv.org/abs/2403.06764.

In front of layer K = 2 of 32 the visual tokens are ranked by the attention that the last token of the prompt pays them
in the layer before, mean over heads. The best stay in order, with their original positions.

Only that row of the attention is computed, from queries and keys, so that any attention implementation works. K scales
with the depth of the language model; the tokens behind it are those that make the mean N in 32 layers.
"""

import torch

from .encoder import top
from .llm import Row


LAYER = 2


def choose(row: Row, count: int) -> torch.LongTensor:
    """
    Args:
        row (`Row`): for its attention.
        count (`int`): visual tokens behind the layer.
    """
    last = int(row.text[-1]) if len(row.text) else int(row.visual[-1])
    return row.visual[top(row.attention(last)[row.visual], count)]
