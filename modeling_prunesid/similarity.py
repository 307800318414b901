"""How similar the tokens of a view are (equations 4 and 5), and which of them can be compared at all."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .exact import gram, is_batched, power_of_two, product


TINY = 2.0**-80  # tokens without a larger entry count as zero: their squares are no fp32 numbers
SAFE_LENGTHS = 2.0**-40, 2.0**60  # of tokens whose squares need no care
RESOLUTION = 2.0**20
WHOLE_REGISTERS = 16


@dataclass
class Pairs:
    """
    Tokens beside one another.

    Attributes:
        features (`torch.FloatTensor` of shape `(views, tokens, dim)`): zero where not finite.
        finite (`torch.BoolTensor` of shape `(views, tokens)`): which tokens count.
        rho (`torch.FloatTensor` of shape `(views,)`): their mean similarity, equation 4.
        lengths (`torch.LongTensor` of shape `(views, 1)`): T of each view.
        cosines (`torch.FloatTensor` of shape `(views, tokens, tokens)`, *optional*): not on a CPU.
        scales (`torch.FloatTensor` of shape `(views, tokens)`, *optional*): inverse lengths of vectors, on a CPU.
    """

    features: torch.Tensor
    finite: torch.Tensor
    rho: torch.Tensor
    lengths: torch.Tensor
    cosines: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    def similarity(self, order: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """Similarity `(views, tokens, tokens)` of the tokens in an order by group; -inf between groups."""
        if self.cosines is not None:
            tokens = order.shape[1]
            rows = self.cosines.gather(1, order[:, :, None].expand(-1, -1, tokens))
            whole = rows.gather(2, order[:, None].expand(-1, tokens, -1))
            return whole.masked_fill(members[:, :, None] != members[:, None], -math.inf)
        order, members = order[0], members[0]
        units = self.features[0].index_select(0, order).mul_(self.scales[0, order, None])
        similarity = units.new_full((len(units), len(units)), -math.inf)
        end = 0
        for group in units.split(members.unique_consecutive(return_counts=True)[1].tolist()):
            start, end = end, end + len(group)
            product(group, group.T, out=similarity[start:end, start:end])
        return similarity[None]


def compare(views: torch.Tensor, attention: torch.Tensor | None, context: Any) -> Pairs:
    """
    The tokens of each view `(views, tokens, dim)` beside one another; those without a finite `attention`
    `(views, tokens)` do not count. A zero vector is similar to nothing, and fewer than two tokens have no redundancy.
    """
    batch, tokens, _ = views.shape
    if not is_batched(views):
        features, scales, finite = finite_features(views[0], None if attention is None else attention[0])
        rho = _mean_similarity(features, scales, finite)
        lengths = torch.full((1, 1), tokens)
        return Pairs(features[None], finite[None], rho[None], lengths, scales=scales[None])
    lengths = torch.full((batch, 1), tokens, device=views.device)
    valid = None
    if context.lengths is not None and set(context.lengths) != {tokens}:
        lengths = torch.tensor(context.lengths).to(views.device, non_blocking=True)[:, None]
        valid = torch.arange(tokens, device=views.device) < lengths
    features, similarity, finite = cosines(views, valid, attention)
    return Pairs(features, finite, _mean_of_pairs(similarity, finite), lengths, cosines=similarity)


def distances(views: torch.Tensor, least: float) -> torch.Tensor:
    """Cosine distances `(views, tokens, tokens)` of all pairs, at least `least`."""
    if is_batched(views):
        return (1 - cosines(views)[1]).clamp(min=least)
    features, scales, _ = finite_features(views[0], None)
    units = features * scales[:, None]
    # Equal tokens are to stay equal, but products round them differently at their edge.
    tokens = len(units)
    units = torch.nn.functional.pad(units, (0, 0, 0, -tokens % WHOLE_REGISTERS))
    return (1 - product(units, units.T))[None, :tokens, :tokens].clamp_(min=least)


def finite_features(
    hidden_states: torch.Tensor, attention: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    fp32 features `(tokens, dim)` of one view on a CPU and the inverses of their lengths `(tokens,)`, zero for the
    tokens that the mask `(tokens,)` calls non-finite. A zero vector has the inverse length zero.
    """
    features = hidden_states.float().contiguous()
    lengths = torch.linalg.vector_norm(features, dim=1)
    shortest, longest = map(float, lengths.aminmax())
    if SAFE_LENGTHS[0] <= shortest and longest <= SAFE_LENGTHS[1]:
        finite, scales, powers = torch.ones_like(lengths, dtype=torch.bool), 1 / lengths, None
    else:
        peaks = features.abs().amax(1)
        powers = power_of_two(torch.where(peaks.isfinite() & (peaks >= TINY), peaks, 1.0))
        scaled = torch.where(peaks >= TINY, 1 / powers, 0.0)[:, None] * features
        lengths = torch.where(peaks.isfinite(), torch.linalg.vector_norm(scaled, dim=1), math.nan)
        finite = lengths.isfinite()
        scales = torch.where(finite & (lengths > 0), 1 / lengths, 0.0)
    if attention is not None:
        finite = finite & attention.isfinite()
        scales = torch.where(finite, scales, 0.0)
    if powers is not None:
        scales = scales / powers
    if not finite.all():
        features = torch.where(finite[:, None], features, 0.0)
    return features, scales, finite


def _mean_similarity(features: torch.Tensor, scales: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """Equation 4 from the unit vectors u: |sum of u|^2 counts each pair twice, and each vector with itself."""
    tokens = finite.sum()
    with_itself = (scales > 0).sum()
    pairs_twice = tokens * (tokens - 1)
    similarity = product(scales, features).square().sum() - with_itself
    return torch.where(tokens > 1, similarity / pairs_twice.clamp(min=1), 0.0)


def cosines(
    views: torch.Tensor, valid: torch.Tensor | None = None, attention: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    fp32 features `(views, tokens, dim)`, the cosine similarity `(views, tokens, tokens)` of all pairs of them, and
    which tokens `(views, tokens)` are finite. The others are zero, and similar to nothing, themselves included.
    """
    features, scaled, finite = within_one(views, valid, attention)
    similarity = gram(scaled)
    scales = inverse_lengths(similarity.diagonal(dim1=-2, dim2=-1))
    return features, similarity * (scales[..., :, None] * scales[..., None, :]), finite


def within_one(
    views: torch.Tensor, valid: torch.Tensor | None = None, attention: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 features as of `cosines`, the same scaled by powers of two to entries in (-1, 1), and which are finite."""
    features = views.float()
    peaks = features.abs().amax(-1)
    finite = peaks.isfinite()
    for mask in (valid, None if attention is None else attention.isfinite()):
        finite = finite if mask is None else finite & mask
    features = torch.where(finite[..., None], features, 0.0)
    powers = power_of_two(torch.where(finite & (peaks >= TINY), peaks, math.inf))
    # Scaled in two steps, for subnormal factors are zero on some devices.
    return features, features * 2.0**-20 * (2.0**19 / powers)[..., None], finite


def inverse_lengths(squares: torch.Tensor) -> torch.Tensor:
    """1 / |v| of squared lengths; that of a zero vector is zero."""
    return torch.where(squares > 0, 1 / squares.clamp(min=TINY).sqrt(), 0.0)


def _mean_of_pairs(similarity: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """Equation 4 `(views,)` from the similarities of all pairs, summed as integers."""
    whole = (similarity * RESOLUTION).round()
    both_ways = whole.sum((-2, -1), dtype=torch.long) - whole.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.long)
    tokens = finite.sum(-1)
    pairs = (tokens * (tokens - 1)).clamp(min=1)
    return both_ways.float() / (pairs.float() * RESOLUTION)
