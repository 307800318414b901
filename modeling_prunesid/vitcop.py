"""
ViTCoP (arXiv 2601.17818) on tensors: three stages that leave fewer and fewer visual tokens.

Stage I, in the vision tower, keeps the tokens that the CLS token attends to most and clusters them. Stage II, in an
early layer of the language model, keeps the best tokens of each cluster and merges the others. Stage III, in a late
layer, keeps a fifth of the others. Inside the language model a token is the more important the smaller the L2 norm
of its key is, so that no attention weights are needed.
"""

import math

import torch


# Bandwidth of the density, and the furthest that a token may lie from its parent, in sides of the picture.
_BANDWIDTH, _REACH = 8.0, 0.6
# The published layers of stages II and III, of 32, and the share of tokens that stage III leaves.
_MERGE_LAYER, _PRUNE_LAYER, _LAYERS = 2, 22, 32
_LAST_SHARE = 1 / 5
# Of the published settings, the smallest share of tokens that stage II leaves, 77 of 172 at a mean of 64.
_LEAST_LEFT = 77 / 172


def scaled_layers(num_layers: int, merge_layer: int | None = None, prune_layer: int | None = None) -> tuple[int, int]:
    """
    The layers S and D that stages II and III run in front of. By default the published 2 and 22 of 32, at the same
    depth of any language model: `round(L / 16)`, at least 1, and `round(11 L / 16)`, after S. D = L is no stage III.

    Raises:
        `ValueError`: unless 1 <= S < D <= L.
    """
    scale = num_layers / _LAYERS
    first = max(round(_MERGE_LAYER * scale), 1) if merge_layer is None else merge_layer
    second = max(round(_PRUNE_LAYER * scale), first + 1) if prune_layer is None else prune_layer
    if not 1 <= first < second <= num_layers:
        raise ValueError(
            f"merge_layer={first} and prune_layer={second} must satisfy 1 <= merge_layer < prune_layer <= L, with "
            f"L = {num_layers} layers of the language model. Leave them None for the default."
        )
    return first, second


def plan_counts(target: int, entering: int, num_layers: int, merge_layer: int, prune_layer: int) -> tuple[int, int]:
    """
    How many of the `entering` tokens are left in front of layers S and D, R and R/5, so that the mean over the layers
    is `target`. Where R would exceed what enters, nothing is dropped at S, and D leaves what meets the target.

    Raises:
        `ValueError`: if the layers before S alone exceed the target.
    """
    if entering <= target:
        return entering, entering
    last_layers = num_layers - prune_layer
    total = num_layers * target - merge_layer * entering
    left = round(total / (prune_layer - merge_layer + last_layers * _LAST_SHARE))
    if left < 1:
        raise ValueError(
            f"A mean of {target} visual tokens over {num_layers} layers (prunesid_config.llm_budget, or "
            f"vitcop_config.budget) cannot be reached: {entering} enter the language model, and none is dropped in "
            f"front of layer {merge_layer}. Let fewer enter, or raise the mean."
        )
    if left > entering and last_layers:
        return entering, max(round((num_layers * target - prune_layer * entering) / last_layers), 1)
    return min(left, entering), max(round(left * _LAST_SHARE), 1)


def default_shares(share: float, num_layers: int, merge_layer: int, prune_layer: int) -> tuple[float, float]:
    """
    V and p for a target share P: V = 0.2 + 0.9 P, p = 0.09 + 0.27 P, the lines through the three published settings.

    V is no larger than lets stage II leave 77/172 of what enters, as at the smallest published budget, so that every
    budget can be met. This binds below P = 1/9, where V falls in proportion to the budget, and in language models of
    few layers, of which those before S are a large part.
    """
    later_layers = prune_layer - merge_layer + (num_layers - prune_layer) * _LAST_SHARE
    most = share * num_layers / (merge_layer + _LEAST_LEFT * later_layers)
    return min(0.2 + 0.9 * share, most, 1.0), 0.09 + 0.27 * share


def count_of_share(share: float, tokens: int) -> int:
    """`int(share * tokens)`, at least 1, whatever the last bit of the share."""
    return max(math.floor(share * tokens + 1e-6), 1)


def select_salient(cls_attention: torch.Tensor, count: int) -> torch.LongTensor:
    """
    Stage I: the tokens that the CLS token attends to most.

    Args:
        cls_attention (`torch.Tensor` of shape `(tokens,)`): the attention weights of the CLS query, summed over heads.
        count (`int`): how many to keep.

    Returns:
        Ascending indices `(count,)`; of equal tokens the first ones.
    """
    return cls_attention.argsort(descending=True, stable=True)[:count].sort().values


def cluster_tokens(keys: torch.Tensor, positions: torch.Tensor, num_centers: int) -> torch.LongTensor:
    """
    Stage I: visual clustering. A token's parent is the nearest token, by key, of those within reach that are as dense
    as itself or denser. Centres are the tokens of largest density times distance to the parent; clusters are the
    trees below them.

    Args:
        keys (`torch.Tensor` of shape `(tokens, dim)`): key projections in the vision tower, all heads.
        positions (`torch.Tensor` of shape `(tokens, 2)`): row and column in [0, 1).
        num_centers (`int`).

    Returns:
        The cluster of each token `(tokens,)`, numbered from 0 by falling rank of the centres. Tokens that are below no
        centre form one more cluster.
    """
    keys, positions = keys.float(), positions.float()
    distances = torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist")
    density = (-((distances / _BANDWIDTH) ** 2)).exp().sum(1)
    spatial = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
    may_be_parent = (density[None, :] >= density[:, None]) & (spatial <= _REACH)
    may_be_parent.fill_diagonal_(False)
    delta, parent = distances.masked_fill(~may_be_parent, float("inf")).min(1)

    tokens = torch.arange(len(keys), device=keys.device)
    centers = (delta * density).argsort(descending=True, stable=True)[:num_centers]
    label = torch.full_like(tokens, len(centers))
    label[centers] = torch.arange(len(centers), device=keys.device)
    parent = torch.where((label < len(centers)) | delta.isinf(), tokens, parent)
    for _ in range(max(len(keys) - 1, 1).bit_length()):  # each round doubles the way that is gone upwards
        parent = parent[parent]
    return label[parent]


def merge_clusters(
    hidden_states: torch.Tensor, norms: torch.Tensor, labels: torch.LongTensor, count: int, num_clusters: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Stage II: leaves `count` tokens. Of each cluster the tokens of smallest norm are kept, in proportion to its size,
    and the others become one token. With more clusters than that, the `count - 1` of the smallest sums of norms become
    one token each, and all others one more.

    A merged token is the hidden state in the middle of its group plus the mean of the group, in the middle's place; of
    two in the middle it is the later one.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`).
        norms (`torch.Tensor` of shape `(tokens,)`): L2 norm of each token's key.
        labels (`torch.LongTensor` of shape `(tokens,)`): clusters, numbered from 0 without gaps.
        count (`int`).
        num_clusters (`int`): how many clusters there are, or one more: nothing waits for the device to count them.

    Returns:
        Hidden states `(count, hidden_size)` and the place of each among the tokens `(count,)`, ascending.
    """
    tokens, device = torch.arange(len(labels), device=labels.device), labels.device
    if count >= len(labels):
        return hidden_states, tokens
    sizes = torch.zeros(num_clusters, dtype=torch.long, device=device).index_add_(0, labels, torch.ones_like(labels))
    sums = torch.zeros(num_clusters, device=device).index_add_(0, labels, norms.float())
    if num_clusters > count:
        rank = sums.masked_fill(sizes == 0, float("inf")).argsort(stable=True).argsort()
        groups, num_groups = rank[labels].clamp(max=count - 1), count
        is_kept = torch.zeros_like(labels, dtype=torch.bool)
    else:
        quotas = cluster_quotas(sizes, sums, len(labels), count)
        by_norm = norms.argsort(stable=True)
        order = by_norm[labels[by_norm].argsort(stable=True)]
        starts = sizes.cumsum(0) - sizes
        place = torch.empty_like(tokens).index_copy(0, order, tokens - starts[labels[order]])
        groups, num_groups, is_kept = labels, num_clusters, place < quotas[labels]

    # Tokens that are kept as they are form one more group, and an empty cluster has its middle behind the last token.
    groups = groups.masked_fill(is_kept, num_groups)
    members = groups.argsort(stable=True)
    sizes = torch.zeros(num_groups + 1, dtype=torch.long, device=device)
    sizes = sizes.index_add_(0, groups, torch.ones_like(groups))[:-1]
    middles = members[(sizes.cumsum(0) - sizes + sizes // 2).clamp(max=len(labels) - 1)]
    middles = middles.masked_fill(sizes == 0, len(labels))
    means = torch.zeros(num_groups + 1, hidden_states.shape[1], device=device)
    means = means.index_add(0, groups[members], hidden_states[members].float())[:-1] / sizes[:, None]
    merged = torch.nn.functional.pad(hidden_states, (0, 0, 0, 1))
    merged = merged.index_copy(0, middles, merged[middles] + means.to(merged.dtype))
    is_left = torch.nn.functional.pad(is_kept, (0, 1)).index_fill(0, middles, True)[:-1]
    left = leading_true(is_left, count)
    return merged[left], left


def leading_true(flags: torch.BoolTensor, count: int) -> torch.LongTensor:
    """The first `count` places `(count,)` where `flags` `(n,)` are true, ascending, without a wait for the device."""
    return (~flags).to(torch.uint8).argsort(stable=True)[:count]


def cluster_quotas(sizes: torch.LongTensor, sums: torch.Tensor, tokens: int, count: int) -> torch.LongTensor:
    """
    How many tokens of each cluster are kept as they are, so that these and one merged token a cluster are `count`:
    in proportion to the other tokens of the clusters, rounded. What is then missing is added one by one to the
    clusters of smallest `sums` of norms, what is too much taken from those of largest.

    Args:
        sizes, sums (`torch.Tensor` of shape `(clusters,)`): of all `tokens`; the last cluster may be empty.
    """
    most, is_empty = len(sizes), (sizes[-1:] == 0).long()
    others, shares = torch.arange(-1, tokens), []  # of a cluster of so many tokens, for both numbers of clusters
    for clusters in (most, most - 1):
        share = (others.double() / (tokens - clusters) * (count - clusters)).round().long()
        shares.append(torch.minimum(share, others).clamp(min=0))
    quotas = torch.stack(shares).to(sizes.device, non_blocking=True)[is_empty, sizes]
    missing = count - most + is_empty - quotas.sum()
    room = torch.where(missing > 0, sizes - 1 - quotas, quotas)
    order = torch.where(missing > 0, sums, -sums).argsort(stable=True)
    rounds = torch.arange(most // 2 + 1, device=sizes.device)[:, None]  # a share is rounded by half a token at most
    has_room = rounds < room[order]
    is_given = has_room & (has_room.flatten().cumsum(0).view(has_room.shape) <= missing.abs())
    return quotas.index_add(0, order, is_given.sum(0) * missing.sign())


def keep_smallest(norms: torch.Tensor, count: int) -> torch.LongTensor:
    """Stage III: ascending indices `(count,)` of the tokens whose keys have the smallest norms `(tokens,)`."""
    return norms.argsort(stable=True)[:count].sort().values
