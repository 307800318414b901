"""The paper's equations 1-6 in fp64 and plain loops, for one image: the oracle of test_selection.py.

Slow on purpose, and shares no code with the package. Beside the kept tokens it returns the `margin` of its decisions:
the smallest distance of any comparison from a tie, in units of what fp32 rounds off the two sides. Below 1 either
outcome of that comparison is right. A tie of two equal tokens is decided: by index.
"""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np


EPS = float(np.finfo(np.float32).eps)


def reference_similarity(x):
    """Equation 5: cosine similarity of all pairs of rows of `x` (tokens, dim); a zero vector is similar to none."""
    lengths = np.array([math.sqrt(float(token @ token)) for token in x])
    units = np.array([token / length if length else token for token, length in zip(x, lengths, strict=True)])
    return units @ units.T


def reference_rho(x):
    """Equation 4: the mean over all unordered pairs of the finite tokens of `x` (tokens, dim); 0 without any pair."""
    x = np.array([token for token in np.asarray(x, dtype=np.float64) if np.isfinite(token).all()])
    if len(x) < 2:
        return 0.0
    similarity = reference_similarity(x)
    total = sum(similarity[i][j] for i in range(len(x)) for j in range(i + 1, len(x)))
    return float(2 * total / (len(x) * (len(x) - 1)))


def reference_components(x, num_components, center):
    """
    Equations 1 and 2: |V| (tokens, components) of the centred and transposed sigmoid features; each component's noise,
    rounding over its distance to the neighbouring eigenvalues, spread over the tokens; and the margin of being null.

    |V| is rounded to 10 digits, far above what fp64 does to it, so that equal tokens are exact ties.
    """
    tokens, dim = x.shape
    z = 1 / (1 + np.exp(-x))
    mean = z.mean(axis=0, keepdims=True) if center == "tokens" else z.mean(axis=1, keepdims=True)
    _, singular_values, v_transposed = np.linalg.svd((z - mean).T, full_matrices=False)
    energies = [*(singular_values**2), *[0.0] * num_components, 0.0]
    floor = tokens * EPS * max(energies[0], tokens * dim * EPS)
    components, noise, margin = np.zeros((tokens, num_components)), [0.0] * num_components, math.inf
    for k in range(num_components):
        margin = min(margin, abs(energies[k] - floor) / (8 * EPS * max(energies[0], dim * EPS)))
        if energies[k] > floor:
            components[:, k] = np.abs(v_transposed[k]).round(10)
            gap = min(energies[k - 1] - energies[k] if k else math.inf, energies[k] - energies[k + 1])
            noise[k] = 8 * EPS * energies[0] / gap / math.sqrt(tokens)
    return components, noise, margin


def reference_nms(ranked_groups, similarity, tau, margins):
    """Section 3.3: the survivors of each group, best token first. Distances to tau are added to `margins`."""
    survivors = []
    for ranked in ranked_groups:
        kept = []
        for i in ranked:
            margins += [abs(similarity[i][j] - tau) / (8 * EPS * max(1, abs(tau))) for j in kept]
            if all(similarity[i][j] < tau for j in kept):
                kept.append(i)
        survivors.append(kept)
    return survivors


def reference_auto_nms(ranked_groups, similarity, budget, margins):
    """Ours: NMS at the smallest tau that leaves `budget` survivors, by 16 bisections of [-1, 1]."""
    low, high, survivors = -1.0, 1.0, ranked_groups
    for _ in range(16):
        middle = (low + high) / 2
        trial = reference_nms(ranked_groups, similarity, middle, margins)
        if sum(len(group) for group in trial) >= budget:
            high, survivors = middle, trial
        else:
            low = middle
    return survivors


def proportional(sizes, total):
    """Equation 6 with largest remainders: exact shares, rounded so that they sum to `total`."""
    shares = [Fraction(size * total, sum(sizes)) for size in sizes]
    quotas = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda k: (quotas[k] - shares[k], k))
    for k in by_remainder[: total - sum(quotas)]:
        quotas[k] += 1
    return quotas


def bounded(sizes, held, total, nominal):
    """
    The release's quotas of groups of `sizes` survivors among `held` tokens: one a group, the rest by cumulative
    rounding, halves to the even number; what the bounds cut off goes to the groups with most survivors.
    """
    bounds = [min(5 * math.ceil(nominal / 64), size) for size in sizes]
    while sum(bounds) < min(nominal, sum(held)):
        bounds = [min(bound + 1, most) for bound, most in zip(bounds, held, strict=True)]
    lower = [min(most, 1) for most in held]
    if sum(lower) > total:
        lower = [0] * len(sizes)
    quotas, reached, given = [], 0, 0
    for size, first, bound in zip(sizes, lower, bounds, strict=True):
        reached += size
        goal = round(Fraction((total - sum(lower)) * reached, max(sum(sizes), 1)))  # halves to the even number
        quotas.append(min(first + goal - given, bound))
        given = goal
    for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        quotas[k] += min(bounds[k] - quotas[k], total - sum(quotas))
    return quotas


def reference_spread(x, scores, noise, similarity, budget, margins):
    """
    Ours: one after another the token of largest score ** 0.25 * cosine distance to the nearest kept one.

    Similarities are rounded to 12 digits, so that equal tokens are exact ties.
    """
    weights = [max(score, 0) ** 0.25 for score in scores]
    nearest, kept = [2.0] * len(x), []
    for _ in range(budget):
        gains = [weight * distance for weight, distance in zip(weights, nearest, strict=True)]
        rest = sorted((i for i in range(len(x)) if i not in kept), key=lambda i: (-gains[i], i))
        best = rest[0]
        for i in rest[1:]:
            if (x[i] != x[best]).any() or scores[i] != scores[best]:
                blurred = [j for j in (i, best) if scores[j] > 0]
                blur = [8 * EPS * weights[j] + nearest[j] * noise[j] / 4 / scores[j] ** 0.75 for j in blurred]
                margins.append((gains[best] - gains[i]) / (sum(blur) or 1))
        kept.append(best)
        nearest = [min(nearest[i], max(1 - round(similarity[i][best], 12), 16 * EPS)) for i in range(len(x))]
    return kept


def reference_select(
    x,
    budget,
    cls_attention=None,
    num_groups=None,
    nms_lambda=None,
    center="tokens",
    quota="proportional",
    extra_kept=0,
    projected=None,
):
    """Kept tokens of one image's `x` (tokens, dim), ascending, and the margin of the decisions behind them."""
    x = np.asarray(x, dtype=np.float64)
    tokens = len(x)
    nominal = budget + extra_kept
    budget = min(budget, tokens)
    num_groups = max(nominal // 4, 1) if num_groups is None else num_groups
    nms_lambda = nominal / 32 if nms_lambda is None else nms_lambda

    components, noise, margin = reference_components(x, num_groups, center)
    margins = [margin]
    groups = [max(range(num_groups), key=lambda k: (components[i][k], -k)) for i in range(tokens)]
    for i, g in enumerate(groups):
        if noise[g]:
            margins += [
                (components[i][g] - components[i][k]) / (noise[g] + noise[k]) for k in range(num_groups) if k != g
            ]
    scores = [components[i][groups[i]] for i in range(tokens)] if cls_attention is None else cls_attention

    def rank(members):
        ranked = sorted(members, key=lambda i: (-scores[i], i))
        if cls_attention is None:
            for i, j in pairwise(ranked):
                blur = noise[groups[i]] + noise[groups[j]]
                if blur and (x[i] != x[j]).any():
                    margins.append((scores[i] - scores[j]) / blur)
        return ranked

    similarity = reference_similarity(x)
    if quota == "spread":
        blur = [noise[g] if cls_attention is None else 0.0 for g in groups]
        if projected is not None:
            x, similarity = projected, reference_similarity(projected)
        return sorted(reference_spread(x, scores, blur, similarity, budget, margins)), min(margins)
    ranked_groups = [rank(i for i in range(tokens) if groups[i] == k) for k in range(num_groups)]
    if nms_lambda == "auto":
        survivors = reference_auto_nms(ranked_groups, similarity, budget, margins)
    else:
        survivors = reference_nms(ranked_groups, similarity, nms_lambda * reference_rho(x), margins)

    sizes = [len(group) for group in survivors]
    if quota == "proportional":
        quotas = proportional(sizes, min(budget, sum(sizes)))
    else:
        quotas = bounded(sizes, [len(ranked) for ranked in ranked_groups], budget, nominal)
    kept = []
    for ranked, first, n in zip(ranked_groups, survivors, quotas, strict=True):
        kept += [*first, *(i for i in ranked if i not in first)][:n]
    others = rank(i for i in range(tokens) if i not in kept)
    return sorted(kept + others[: budget - len(kept)]), min(margins)
