"""CDPruner, conditional diversity, https://arxiv.org/abs/2506.10967.

The greedy answer to a determinantal point process (`dpp.py`) whose kernel is the cosine similarity of tower features,
times the relevance of both tokens for the question. Kept in raster order.

Caveat: the paper takes relevance from CLIP's own text tower, which neither DINOv2 nor a LLaVA checkpoint has. Here it
is the mean cosine similarity of the projected token with the embeddings of the words behind the image, scaled to [0,
1] over the image as in the release; what the paper's would reach here is not known. It is the only method on the
encoder's side that reads the question: each question needs a selection, and a cache, of its own.
"""

import torch

from .dpp import likeliest, similarities


LEAST = 1e-6  # keeps the least relevant token from being no token at all


def choose(features: torch.Tensor, projected: torch.Tensor, words: torch.Tensor, budget: int) -> torch.LongTensor:
    """
    Args:
        features (`torch.Tensor` of shape `(T, dim)`), projected (`torch.Tensor` of shape `(T, hidden_size)`):
            the patches of an image, before and behind the projector.
        words (`torch.Tensor` of shape `(words, hidden_size)`): embeddings of the question.
        budget (`int`): N.

    Returns:
        Ascending indices `(N,)`.
    """
    relevant = relevance(projected, words)
    kernel = relevant[:, None] * similarities(features) * relevant
    # The determinant of a set has the factors of its members: scaled up, small ones are not taken for rounding errors.
    return likeliest(kernel / relevant.square().mean(), budget)


def relevance(tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Of projected tokens `(T, dim)` for words `(words, dim)`: `(T,)` in (0, 1], float64; all alike without words."""
    units, asked = (torch.nn.functional.normalize(part.double(), dim=-1) for part in (tokens, words))
    mean = (units @ asked.T).sum(1) / max(len(words), 1)
    low, high = mean.min(), mean.max()
    return (mean - low + LEAST) / (high - low + LEAST)
