"""SparseVLM v1.5 (not v2.0, "SparseVLM+"), visual tokens rated by the text, https://arxiv.org/abs/2410.04417.

Behind layers 2, 6 and 15 of 32 the visual tokens are ranked by the attention that the raters pay them in that layer,
mean over heads and raters. Raters are the words behind the image to which visual tokens, by the softmax over the words
of their products as they enter the language model, give more than an equal share on average. Of the tokens that are
dropped, the top 30% are clustered by density peaks, and of each cluster the mean remains.

How many tokens stay is published for means of 192, 128, 96 and 64 and interpolated for other budgets (none at 0, all
at T). Recycled tokens come on top, so that the true means in 32 layers are 206, 145 and 82 for 192, 128 and 64. The
layers scale with the depth of the language model, and of those that fall together the last remains. Tokens keep their
original positions; a mean stands in the place of its cluster's centre (the release numbers all tokens anew and puts
the means last). A prompt whose words are all rated alike is rated by all of them.

Densities are compared by their logarithms: where tokens lie far apart, as in small models, most densities are 0 in
float32. Of equal ones the first counts as the larger (the release adds unseeded noise of 1e-6).
"""

import torch

from modeling_prunesid.single_views import highest

from .llm import Row


LAYERS = (3, 7, 16)  # in front of which tokens are dropped: behind 2, 6 and 15, counted from 0
PUBLISHED_PATCHES = 576
PUBLISHED_COUNTS = {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}
RECYCLED_SHARE = 0.3
TOKENS_A_CLUSTER = 10


def plan(budget: int, patches: int) -> dict[int, int]:
    """How many visual tokens of an image stay behind each layer, without the recycled ones."""
    scale = patches / PUBLISHED_PATCHES
    known = {0: (0, 0, 0), **PUBLISHED_COUNTS, PUBLISHED_PATCHES: (PUBLISHED_PATCHES,) * len(LAYERS)}
    low = max(known_budget for known_budget in known if known_budget * scale <= budget)
    high = min(known_budget for known_budget in known if known_budget * scale >= budget)
    share = (budget / scale - low) / (high - low) if high > low else 0
    counts = [first + share * (second - first) for first, second in zip(known[low], known[high])]
    return {layer: max(1, round(scale * count)) for layer, count in zip(LAYERS, counts)}


def choose(row: Row, setting: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Args:
        row (`Row`): for its attention, its hidden states, and the tokens as they entered.
        setting (`int`): how many visual tokens of an image stay; one at least is dropped.
    """
    scores = row.attention(find_raters(row))[:, row.visual].mean(0)
    kept = highest(scores, min(setting * row.num_images, len(scores) - 1))
    is_dropped = torch.ones_like(scores, dtype=torch.bool)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero()[:, 0]
    recycled = row.visual[dropped[highest(scores[dropped], int(RECYCLED_SHARE * len(dropped)) + 1)]]
    means, centres = cluster_means(row.hidden_states[recycled], len(recycled) // TOKENS_A_CLUSTER + 1)
    states, places = row.keep(row.visual[kept])
    order = torch.cat([places, recycled[centres]]).sort()
    return torch.cat([states, means])[order.indices], order.values


def find_raters(row: Row) -> torch.LongTensor:
    """Places of the words that rate."""
    if not len(row.text):
        return row.readers
    shares = (row.entered.float() @ row.words.float().T).softmax(1).mean(0)
    raters = row.text[shares > shares.mean()]
    return raters if len(raters) else row.text


def cluster_means(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Clusters `(n, dim)` tokens around `count` peaks: tokens that are dense among their `count` nearest, and far from
    any denser one.

    Returns:
        The mean of each cluster `(count, dim)`, and the index of its peak `(count,)`.
    """
    distances = torch.cdist(tokens.float(), tokens.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / tokens.shape[1] ** 0.5
    log_density = -distances.topk(count, largest=False).values.square().mean(1)
    rank = log_density.argsort(descending=True, stable=True).argsort()
    is_denser = rank[None, :] < rank[:, None]
    separation = torch.where(is_denser, distances, distances.max()).min(1).values
    peaks = (separation.log() + log_density).argsort(descending=True, stable=True)[:count]
    labels = distances[:, peaks].argmin(1)
    labels[peaks] = torch.arange(count, device=peaks.device)
    members = torch.nn.functional.one_hot(labels, count).float()
    means = members.T @ tokens.float() / members.sum(0)[:, None]
    return means.to(tokens.dtype), peaks
