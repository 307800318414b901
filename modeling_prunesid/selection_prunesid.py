"""PruneSID token selection ("Prune Redundancy, Preserve Essence", section 3): which visual tokens of an image to keep.

The steps in the paper's order, each one function:

1. PSCA (section 3.2, equations 1-3): `principal_components` over the *token* axis; each token joins its strongest one.
2. Redundancy (equations 4-5): `redundancy`, the mean cosine similarity over all pairs of tokens.
3. NMS (section 3.3): `survivors`, in each group a token too similar to a better one is suppressed.
4. Quotas (equation 6): `proportional_quotas`; each group hands over its best survivors.
5. Dynamic budgets (section 3.4, equation 7): `information_budgets`, more tokens for images with more information.

It works on tensors and knows no model. Scores are fp32 whatever the input's dtype, and nothing is random, so that the
same image gives the same tokens on every run and in every batch.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real

import torch


CHOICES = {
    "score": ("component", "cls_attention"),
    "center": ("tokens", "features"),
    "quota": ("proportional", "bounded", "spread"),
    "grouping": ("psca", "kmeans", "random"),
}


EPS = torch.finfo(torch.float32).eps
KRYLOV_BLOCK = 16
WHOLE_REGISTERS = 16
COMPILED_ROUNDS = 15
NEVER_SIMILAR = 1.001  # above any cosine similarity with its rounding error
INDISTINCT = 16 * EPS  # cosine distance of equal tokens, at most, with its rounding error


@dataclass
class TokenSelection:
    """
    The tokens that [`select_tokens`] keeps.

    Attributes:
        indices (`torch.LongTensor` of shape `(batch, budget)`):
            Kept tokens of each image, ascending. Where budgets differ by image there are as many columns as the
            largest budget, and shorter rows end in `tokens`, one past the last token.
        counts (`torch.LongTensor` of shape `(batch,)`): number of tokens kept of each image.
        rho (`torch.FloatTensor` of shape `(batch,)`): redundancy of each image, equation 4.
        groups (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
            Group of each token, equation 3; -1 for a non-finite token. `quota="spread"` by CLS attention has none.
        scores (`torch.FloatTensor` of shape `(batch, tokens)`, *optional*):
            Selection score of each token; -inf for a non-finite token.
    """

    indices: torch.LongTensor
    counts: torch.LongTensor
    rho: torch.FloatTensor
    groups: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None


@torch.no_grad()
def select_tokens(
    hidden_states: torch.Tensor,
    budget: int | float | torch.LongTensor,
    *,
    cls_attention: torch.Tensor | None = None,
    projected: torch.Tensor | None = None,
    num_groups: int | None = None,
    nms_lambda: float | str | None = None,
    score: str = "component",
    center: str = "tokens",
    quota: str = "proportional",
    grouping: str = "psca",
    seed: int = 0,
    extra_kept: int = 0,
    return_details: bool = False,
) -> TokenSelection:
    """
    Choose the tokens to keep: exactly N sorted, unique indices an image, whatever the input.

    The defaults are the paper as written; `score="cls_attention"`, `center="features"` and `quota="bounded"` are the
    choices of its authors' release. Ties go to the lower token and the lower component. If NMS leaves fewer than N
    tokens, the suppressed tokens of highest score fill up. A token with a non-finite feature (or attention) takes no
    part in means, similarities or groups: it ranks behind all others.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, dim)`): token features X, any floating dtype.
        budget (`int`, `float` or `torch.LongTensor` of shape `(batch,)`):
            N: a count of at least 1, a share in (0, 1] of the tokens (rounded half up, at least one token), or a count
            for each image. From `tokens` on, nothing is dropped.
        cls_attention (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
            Attention of the CLS token, summed over heads; the score of `score="cls_attention"`.
        projected (`torch.Tensor` of shape `(batch, tokens, any dim)`, *optional*):
            The tokens as the language model would get them, between which `quota="spread"` measures distances; without
            them it does between `hidden_states`.
        num_groups (`int`, *optional*):
            K, the number of components, N/4 by default. Components beyond the rank of the features stay empty.
        nms_lambda (`float` or `str`, *optional*):
            lambda in tau = lambda * rho, N/32 by default. `"auto"`, which is ours and not the paper's, takes the
            smallest tau of each image that leaves N survivors, by 16 bisections of [-1, 1].
        score (`str`):
            `"component"`: |V| of the token in its own group's component (in its strongest one where the groups are not
            PSCA's); or `"cls_attention"`.
        center (`str`): subtract the mean over `"tokens"` (equation 1) or over each token's own `"features"`.
        quota (`str`):
            [`proportional_quotas`], [`bounded_quotas`], or `"spread"`, which is ours: [`spread_tokens`] of the
            whole image, without groups and NMS.
        grouping (`str`): `"psca"` or, to compare (Table 5), [`kmeans_groups`] or [`random_groups`].
        seed (`int`): seed of `grouping="kmeans"` and `"random"`.
        extra_kept (`int`):
            Tokens that the caller keeps besides these. They count in the N of K, lambda and the bounds: the release
            counts CLS in N, which is a budget of N - 1 and one extra.
        return_details (`bool`): also return groups and scores.

    Raises:
        ValueError: an argument is none of the above; the message names it, its value and the mend.
    """
    _check_hidden_states(hidden_states)
    for name, value in {"score": score, "center": center, "quota": quota, "grouping": grouping}.items():
        if value not in CHOICES[name]:
            raise ValueError(f"`{name}` must be one of {CHOICES[name]}, got {value!r}.")
    if num_groups is not None:
        _check_integer("num_groups", num_groups, minimum=1)
    _check_integer("extra_kept", extra_kept, minimum=0)
    _check_integer("seed", seed, minimum=0)
    _check_lambda(nms_lambda)
    if score == "cls_attention":
        _check_cls_attention(cls_attention, hidden_states)
    else:
        cls_attention = None
    if projected is not None:
        _check_projected(projected, hidden_states)

    batch, tokens, _ = hidden_states.shape
    budgets = _budget_of_each_image(budget, batch, tokens)
    rows = []
    with _full_precision(hidden_states.device):
        # One image at a time: matrix products round differently in other batch sizes, and memory stays that of one.
        for row, count in enumerate(budgets):
            if count == tokens and not return_details:
                indices = torch.arange(tokens, device=hidden_states.device)
                rows.append((indices, _mean_similarity(*_finite_features(hidden_states[row], None)), None, None))
                continue
            nominal = count + extra_kept
            rows.append(
                _select_of_one_image(
                    hidden_states[row],
                    None if cls_attention is None else cls_attention[row].float(),
                    None if projected is None else projected[row],
                    count=count,
                    nominal=nominal,
                    num_groups=min(max(nominal // 4, 1) if num_groups is None else num_groups, tokens),
                    nms_lambda=nominal / 32 if nms_lambda is None else nms_lambda,
                    center=center,
                    quota=quota,
                    grouping=grouping,
                    seed=seed,
                )
            )
    indices, rho, groups, scores = zip(*rows, strict=True)
    return TokenSelection(
        indices=torch.nn.utils.rnn.pad_sequence(indices, batch_first=True, padding_value=tokens),
        counts=torch.tensor(budgets, device=hidden_states.device),
        rho=torch.stack(rho),
        groups=torch.stack(groups) if return_details and groups[0] is not None else None,
        scores=torch.stack(scores) if return_details else None,
    )


@torch.no_grad()
def redundancy(hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Redundancy rho of each image: the mean cosine similarity over all pairs of its tokens (equations 4 and 5).

    The unit vectors' sum holds the sum of all pairs, so that the cost is O(tokens * dim). Non-finite tokens are left
    out, a zero vector is similar to nothing, and fewer than two tokens have no redundancy.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, dim)`): token features, any floating dtype.

    Returns:
        `torch.FloatTensor` of shape `(batch,)`.
    """
    _check_hidden_states(hidden_states)
    with _full_precision(hidden_states.device):
        return torch.stack([_mean_similarity(*_finite_features(row, None)) for row in hidden_states])


def information_budgets(
    rho: torch.Tensor,
    budget: int | float,
    num_tokens: int,
    reference: float,
    minimum: int | None = None,
    maximum: int | None = None,
) -> torch.LongTensor:
    """
    Budget N' of each image in proportion to its information 1 - rho (section 3.4, equation 7).

    N' = N * (1 - rho) / reference, rounded half up. With the mean information of a data set as the reference, the mean
    of N' over that data set is N.

    Args:
        rho (`torch.Tensor` of shape `(batch,)`): redundancy of each image, see [`redundancy`].
        budget (`int` or `float`): N at the reference: a count, or a share in (0, 1] of the tokens.
        num_tokens (`int`): tokens of each image.
        reference (`float`): information that receives exactly N.
        minimum, maximum (`int`, *optional*): bounds of N', by default 1 and `num_tokens`.

    Returns:
        `torch.LongTensor` of shape `(batch,)`, each in [1, `num_tokens`].

    Raises:
        ValueError: a budget, reference or bound that is not positive, or a minimum above the maximum.
    """
    if isinstance(reference, bool) or not isinstance(reference, Real) or not 0 < reference < math.inf:
        raise ValueError(f"`reference` must be a positive number, the mean of 1 - rho, got {reference!r}.")
    lowest, highest = 1, num_tokens
    if minimum is not None:
        _check_integer("minimum", minimum, minimum=1)
        lowest = min(minimum, num_tokens)
    if maximum is not None:
        _check_integer("maximum", maximum, minimum=1 if minimum is None else minimum)
        highest = min(maximum, num_tokens)
    budgets = resolve_budget(budget, num_tokens) * (1 - rho.double()) / reference
    return (budgets + 0.5).floor().clamp(lowest, highest).long()


def principal_components(
    features: torch.Tensor, finite: torch.Tensor, num_components: int, center: str
) -> torch.Tensor:
    """
    |V| of the top components over the token axis (PSCA, equations 1 and 2).

    V are the eigenvectors of the tokens x tokens Gram matrix of the centred sigmoid features. Null components, whose
    eigenvalue is rounding error beside the largest one or beside the entries before centring, are zero.

    Args:
        features (`torch.FloatTensor` of shape `(tokens, dim)`): zero where not finite.
        finite (`torch.BoolTensor` of shape `(tokens,)`): which tokens count.
        num_components (`int`): K, at most `tokens`.
        center (`str`): `"tokens"` or `"features"`.

    Returns:
        `torch.FloatTensor` of shape `(tokens, num_components)`, the largest component first.
    """
    tokens, dim = features.shape
    rescaled = features.sigmoid()
    if center == "tokens":
        rescaled -= finite.float() @ rescaled / finite.sum().clamp(min=1)
    else:
        rescaled -= rescaled.mean(1, keepdim=True)
    rescaled *= finite[:, None]
    # Equal tokens are to stay equal, but products round them differently at their edge, and with a single vector.
    if tokens % WHOLE_REGISTERS:
        rescaled = torch.nn.functional.pad(rescaled, (0, 0, 0, -tokens % WHOLE_REGISTERS))
    eigenvalues, eigenvectors = top_eigenvectors(rescaled, min(max(num_components, 2), tokens))
    null = eigenvalues <= tokens * EPS * eigenvalues[0].clamp(min=tokens * dim * EPS)
    return eigenvectors[:tokens, :num_components].abs().masked_fill(null[:num_components], 0)


def top_eigenvectors(features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest eigenvalues of the Gram matrix M = F F^T of the features F, and their eigenvectors.

    Block Krylov: the products of M with the means of 16 stretches of its rows, made orthogonal before and after they
    are scaled, span at least 2.5 * count + 38 directions, and the small problem inside them is solved exactly. The
    eigenvectors v found there are multiplied by M once more: M v / w is closer to the truth, and has equal entries for
    equal rows of F. M itself is never formed: a product with it is two thin ones with F.

    The answer stands if every residual |M v - w v| is at most 2^-8 w_K and 2^-13 w_1, or sqrt(tokens) * eps * w_1,
    the rounding error of the products themselves. If not, half as many directions are added; if still not (spectra
    without decay), and where the span would be a third of the whole space, all eigenvectors are computed. Compiled
    code cannot branch on the residual and keeps the first Krylov answer.

    Args:
        features (`torch.FloatTensor` of shape `(tokens, dim)`): F.
        count (`int`): K, at most `tokens`.

    Returns:
        Eigenvalues of shape `(count,)`, falling, and eigenvectors of shape `(tokens, count)`.
    """
    tokens = len(features)
    steps = math.ceil((2.5 * count + 38) / KRYLOV_BLOCK)
    if 3 * steps * KRYLOV_BLOCK < tokens:
        length = tokens // KRYLOV_BLOCK
        block = features @ features[: KRYLOV_BLOCK * length].reshape(KRYLOV_BLOCK, length, -1).mean(1).T
        basis = features.new_empty((steps + steps // 2) * KRYLOV_BLOCK, tokens)
        products = torch.empty_like(basis)
        for step in range(steps + steps // 2):
            known, size = basis[: step * KRYLOV_BLOCK], (step + 1) * KRYLOV_BLOCK
            block = torch.addmm(block, known.T, known @ block, alpha=-1)
            block = torch.linalg.qr(block).Q
            block = torch.addmm(block, known.T, known @ block, alpha=-1)
            basis[len(known) : size] = block.T
            block = features @ (block.T @ features).T
            products[len(known) : size] = block.T
            if step + 1 not in (steps, steps + steps // 2):
                continue
            eigenvalues, rotation = torch.linalg.eigh(basis[:size] @ products[:size].T)
            eigenvalues, rotation = eigenvalues.flip(0)[:count, None], rotation.flip(1)[:, :count].T
            images = rotation @ products[:size]
            residuals = torch.linalg.vector_norm(images - eigenvalues * (rotation @ basis[:size]), dim=1)
            tolerance = (2**-8 * eigenvalues[-1]).minimum(2**-13 * eigenvalues[0])
            tolerance = tolerance.maximum(math.sqrt(tokens) * EPS * eigenvalues[0])
            if torch.compiler.is_compiling() or residuals.max() <= tolerance:
                return eigenvalues[:, 0], (images / eigenvalues).T
    gram = features @ features.T
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    eigenvalues, eigenvectors = eigenvalues.flip(0)[:count], eigenvectors.flip(1)[:, :count]
    return eigenvalues, (eigenvectors.T @ gram).T / eigenvalues


def kmeans_groups(features: torch.Tensor, finite: torch.Tensor, num_groups: int, seed: int) -> torch.Tensor:
    """
    Groups by 10 rounds of Lloyd's k-means on the features, from the first tokens of a seeded shuffle (Table 5).

    An empty group keeps its centre, and a token between two centres joins the lower group.

    Args:
        features (`torch.FloatTensor` of shape `(tokens, dim)`): zero where not finite.
        finite (`torch.BoolTensor` of shape `(tokens,)`): which tokens count.
        num_groups (`int`): K, at most `tokens`.
        seed (`int`): seed of the shuffle.

    Returns:
        `torch.LongTensor` of shape `(tokens,)`.
    """
    centres = features[_shuffle(finite, seed)[:num_groups]]
    for _ in range(10):
        groups = (centres.square().sum(1) - 2 * features @ centres.T).argmin(1)
        members = torch.nn.functional.one_hot(groups, num_groups) * finite[:, None]
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T.float() @ features / sizes.clamp(min=1), centres)
    return groups


def random_groups(finite: torch.Tensor, num_groups: int, seed: int) -> torch.Tensor:
    """
    Groups of even size by a seeded shuffle, the same on every device (Table 5).

    Args:
        finite (`torch.BoolTensor` of shape `(tokens,)`): which tokens count.
        num_groups (`int`): K.
        seed (`int`): seed of the shuffle.

    Returns:
        `torch.LongTensor` of shape `(tokens,)`.
    """
    position = torch.arange(len(finite), device=finite.device)
    return torch.empty_like(position).scatter(0, _shuffle(finite, seed), position % num_groups)


def survivors(similarity: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """
    Greedy NMS (section 3.3): a token survives unless its similarity to a better survivor of its group reaches tau.

    Each round decides again from the round before. A token whose better rivals are settled is settled, so that the
    rounds end at the greedy answer. Compiled code, which cannot look whether they have, makes 15: exact on all
    photographs tried, and an odd count never leaves two tokens in conflict.

    Args:
        similarity (`torch.FloatTensor` of shape `(tokens, tokens)`): see `_similarity_in_groups`.
        tau (`torch.FloatTensor`, a scalar): the threshold.

    Returns:
        `torch.BoolTensor` of shape `(tokens,)`, in the order of the rows of `similarity`.
    """
    conflicts = torch.ge(similarity, tau, out=torch.empty_like(similarity)).tril_(-1)
    alive = torch.ones_like(conflicts[0])
    compiling = torch.compiler.is_compiling()
    for _ in range(COMPILED_ROUNDS if compiling else len(similarity)):
        before, alive = alive, (conflicts @ alive == 0).float()
        if not compiling and torch.equal(before, alive):
            break
    return alive.bool()


def proportional_quotas(sizes: torch.Tensor, total: int | torch.Tensor) -> torch.Tensor:
    """
    Share out `total` tokens in proportion to the groups' survivors (equation 6), by largest remainder.

    The paper rounds each share, which need not sum to N. Equal remainders go to the lower group.

    Args:
        sizes (`torch.LongTensor` of shape `(groups,)`): survivors of each group.
        total (`int` or scalar `torch.LongTensor`): tokens to share out, at most all survivors.

    Returns:
        `torch.LongTensor` of shape `(groups,)`, none above its group's size, their sum `total`.
    """
    shares = sizes * total
    quotas = shares // sizes.sum().clamp(min=1)
    remainders = shares - quotas * sizes.sum()
    by_remainder = remainders.argsort(descending=True, stable=True)
    rank = torch.empty_like(by_remainder).scatter(0, by_remainder, torch.arange(len(sizes), device=sizes.device))
    return quotas + (rank < total - quotas.sum())


def bounded_quotas(sizes: torch.Tensor, total: int | torch.Tensor, nominal: int, tokens: int) -> torch.Tensor:
    """
    Share out `total` tokens between bounds, as the authors' release does.

    Each group with survivors gets one token; the others follow by cumulative rounding of the survivors' shares, up to
    5 * ceil(N / 64) a group, a bound raised by the least that lets the groups hold `total`; what it cuts off goes to
    the groups with most survivors. Two rules are ours: no group takes a suppressed token before another's survivor,
    and no group is sure of a token where the groups outnumber `total`.

    Args:
        sizes (`torch.LongTensor` of shape `(groups,)`): survivors of each group.
        total (`int` or scalar `torch.LongTensor`): tokens to share out, at most all survivors.
        nominal (`int`): N of the bound.
        tokens (`int`): tokens of the image, at least the size of any group.

    Returns:
        `torch.LongTensor` of shape `(groups,)`, none above its group's size, their sum `total`.
    """
    held_by_bound = sizes.clamp(max=torch.arange(tokens + 1, device=sizes.device)[:, None]).sum(1)
    upper = sizes.minimum((held_by_bound < total).sum().clamp(min=5 * math.ceil(nominal / 64)))
    lower = sizes.clamp(max=1)
    lower = lower * (lower.sum() <= total)

    cumulative = sizes.cumsum(0)
    goals = (2 * (total - lower.sum()) * cumulative + cumulative[-1]) // (2 * cumulative[-1]).clamp(min=1)
    quotas = (lower + goals.diff(prepend=torch.zeros_like(goals[:1]))).minimum(upper)
    largest_first = sizes.argsort(descending=True, stable=True)
    room = (upper - quotas)[largest_first]
    added = (total - quotas.sum() - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
    return quotas.scatter_add(0, largest_first, added)


def spread_tokens(units: torch.Tensor, scores: torch.Tensor, count: int) -> torch.BoolTensor:
    """
    Ours: the token of highest score, then one after another that of largest score ** 0.25 * distance.

    The distance is the cosine distance to the nearest kept token. With equal scores this is the greedy answer to the
    max-min diversity problem. Tokens that rounding cannot tell from a kept one are `INDISTINCT` away from it, so that
    they follow by score. Ties go to the lower token.

    Args:
        units (`torch.FloatTensor` of shape `(tokens, dim)`): the tokens, scaled to length 1.
        scores (`torch.FloatTensor` of shape `(tokens,)`): negative ones count as 0; tokens at -inf come last.
        count (`int`): tokens to keep, at most `tokens`.

    Returns:
        `torch.BoolTensor` of shape `(tokens,)`, `count` of them true.
    """
    tokens = len(units)
    # Equal tokens are to stay equal, but products round them differently at their edge.
    units = torch.nn.functional.pad(units, (0, 0, 0, -tokens % WHOLE_REGISTERS))
    distances = (1 - units @ units.T)[:tokens, :tokens].clamp(min=INDISTINCT)
    finite, weights = scores > -math.inf, scores.clamp(min=0).sqrt().sqrt()
    nearest, kept = torch.full_like(scores, 2), torch.zeros_like(finite)
    for _ in range(count):
        gains = torch.where(finite, weights * nearest, -1).masked_fill(kept, -2)
        chosen = gains.argmax(0, keepdim=True)
        kept = kept.index_fill(0, chosen, True)
        nearest = nearest.minimum(distances.index_select(0, chosen)[0])
    return kept


def _select_of_one_image(
    hidden_states: torch.Tensor,
    cls_attention: torch.Tensor | None,
    projected: torch.Tensor | None,
    *,
    count: int,
    nominal: int,
    num_groups: int,
    nms_lambda: float | str,
    center: str,
    quota: str,
    grouping: str,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Indices `(count,)`, rho `()`, groups `(tokens,)` and scores `(tokens,)` of one image's `(tokens, dim)`."""
    features, scales, finite = _finite_features(hidden_states, cls_attention)
    rho = _mean_similarity(features, scales, finite)
    if quota == "spread" and cls_attention is not None:
        scores = cls_attention.masked_fill(~finite, -math.inf)
        return _spread_indices(features, scales, projected, scores, count), rho, None, scores

    components = principal_components(features, finite, num_groups, center)
    component_scores, groups = components.max(1)
    if grouping == "kmeans":
        groups = kmeans_groups(features, finite, num_groups, seed)
    elif grouping == "random":
        groups = random_groups(finite, num_groups, seed)
    scores = component_scores if cls_attention is None else cls_attention
    scores = scores.masked_fill(~finite, -math.inf)

    if quota == "spread":
        indices = _spread_indices(features, scales, projected, scores, count)
        return indices, rho, groups.masked_fill(~finite, -1), scores

    # Non-finite tokens come last in the ranking and form a group of their own behind the others.
    ranking = scores.argsort(descending=True, stable=True)
    members = groups.masked_fill(~finite, num_groups)
    order = ranking[members[ranking].argsort(stable=True)]
    members = members[order]
    alive = members < num_groups
    if nms_lambda == "auto" or torch.compiler.is_compiling() or nms_lambda * rho < NEVER_SIMILAR:
        units = features.index_select(0, order).mul_(scales[order, None])
        similarity = _similarity_in_groups(units, members)
        if nms_lambda == "auto":
            alive = _survivors_of_smallest_tau(similarity, alive, count)
        else:
            alive = alive & survivors(similarity, nms_lambda * rho)

    sizes = torch.zeros(num_groups + 1, dtype=torch.long, device=order.device).scatter_add(0, members, alive.long())
    total = sizes.sum().clamp(max=count)
    if quota == "proportional":
        quotas = proportional_quotas(sizes, total)
    else:
        quotas = bounded_quotas(sizes, total, nominal, len(order))
    place_in_group = alive.cumsum(0) - 1 - (sizes.cumsum(0) - sizes)[members]
    kept = torch.zeros_like(alive).scatter(0, order, alive & (place_in_group < quotas[members]))

    spare = ~kept[ranking]
    filled = spare & (spare.cumsum(0) <= count - total)
    kept = kept | torch.zeros_like(kept).scatter(0, ranking, filled)
    indices = (~kept).byte().argsort(stable=True)[:count]
    return indices, rho, groups.masked_fill(~finite, -1), scores


def _spread_indices(
    features: torch.Tensor, scales: torch.Tensor, projected: torch.Tensor | None, scores: torch.Tensor, count: int
) -> torch.Tensor:
    """Ascending indices `(count,)` of [`spread_tokens`] between `projected`, or `features`."""
    if projected is not None:
        features, scales, _ = _finite_features(projected, None)
    return (~spread_tokens(features * scales[:, None], scores, count)).byte().argsort(stable=True)[:count]


def _finite_features(
    hidden_states: torch.Tensor, cls_attention: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    fp32 features `(tokens, dim)` and the inverses of their lengths `(tokens,)`, zero for the tokens that the mask
    `(tokens,)` calls non-finite. A zero vector has the inverse length zero.
    """
    features = hidden_states.float().contiguous()
    lengths = torch.linalg.vector_norm(features, dim=1)
    finite = lengths.isfinite()
    if cls_attention is not None:
        finite = finite & cls_attention.isfinite()
    scales = torch.where(finite & (lengths > 0), 1 / lengths, 0.0)
    if torch.compiler.is_compiling() or not finite.all():
        features = torch.where(finite[:, None], features, 0.0)
    return features, scales, finite


def _mean_similarity(features: torch.Tensor, scales: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """Equation 4 from the unit vectors u: |sum of u|^2 counts each pair twice, and each vector with itself."""
    tokens = finite.sum()
    with_itself = (scales > 0).sum()
    pairs_twice = tokens * (tokens - 1)
    similarity = (scales @ features).square().sum() - with_itself
    return torch.where(tokens > 1, similarity / pairs_twice.clamp(min=1), 0.0)


def _similarity_in_groups(units: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """
    Similarity `(tokens, tokens)` of the tokens, sorted by group; -inf between groups.

    On a CPU each group is one product. One product of all tokens is faster on other devices, and compiled code cannot
    look where the groups begin.
    """
    if torch.compiler.is_compiling() or units.device.type != "cpu":
        return (units @ units.T).masked_fill(members[:, None] != members, -math.inf)
    similarity = units.new_full((len(units), len(units)), -math.inf)
    end = 0
    for group in units.split(members.unique_consecutive(return_counts=True)[1].tolist()):
        start, end = end, end + len(group)
        torch.mm(group, group.T, out=similarity[start:end, start:end])
    return similarity


def _survivors_of_smallest_tau(similarity: torch.Tensor, valid: torch.Tensor, count: int) -> torch.Tensor:
    """Survivors at the smallest tau that leaves `count` of them, by bisection of [-1, 1]."""
    low, high = similarity.new_tensor(-1.0), similarity.new_tensor(1.0)
    alive = valid
    for _ in range(16):
        middle = (low + high) / 2
        trial = survivors(similarity, middle) & valid
        enough = trial.sum() >= count
        alive = torch.where(enough, trial, alive)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return alive


def _shuffle(finite: torch.Tensor, seed: int) -> torch.Tensor:
    """A seeded permutation of the tokens, drawn on the CPU, with the non-finite ones behind."""
    permutation = torch.randperm(len(finite), generator=torch.Generator().manual_seed(seed)).to(finite.device)
    return permutation[(~finite[permutation]).byte().argsort(stable=True)]


@contextmanager
def _full_precision(device: torch.device):
    """fp32 means fp32: no autocast, and no TF32 or bf16 inside matrix products, whatever the process allows."""
    with torch.autocast(device.type, enabled=False):
        if torch.compiler.is_compiling():  # a compiled graph keeps the setting of the process
            yield
            return
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)


def resolve_budget(budget: int | float, tokens: int) -> int:
    """The count that a count or a share stands for, at most `tokens`."""
    if isinstance(budget, Integral) and not isinstance(budget, bool) and budget >= 1:
        return min(int(budget), tokens)
    if isinstance(budget, Real) and not isinstance(budget, Integral) and 0 < budget <= 1:
        return max(math.floor(budget * tokens + 0.5), 1)
    raise ValueError(
        f"`budget` must be a number of tokens (an int of at least 1) or a share of them (a float in (0, 1]), "
        f"got {budget!r}."
    )


def _budget_of_each_image(budget: int | float | torch.Tensor, batch: int, tokens: int) -> list[int]:
    if not isinstance(budget, torch.Tensor):
        return [resolve_budget(budget, tokens)] * batch
    if budget.is_floating_point() or budget.is_complex() or budget.dtype == torch.bool or budget.shape != (batch,):
        raise ValueError(
            f"`budget` as a tensor must hold one integer for each of the {batch} images, "
            f"got shape {tuple(budget.shape)} and {budget.dtype}."
        )
    return [resolve_budget(count, tokens) for count in budget.tolist()]


def _check_hidden_states(hidden_states: torch.Tensor) -> None:
    if hidden_states.dim() != 3 or 0 in hidden_states.shape or not hidden_states.is_floating_point():
        raise ValueError(
            "`hidden_states` must be a floating tensor of shape (batch, tokens, dim), none of them 0, "
            f"got shape {tuple(hidden_states.shape)} and {hidden_states.dtype}."
        )


def _check_cls_attention(cls_attention: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
    if cls_attention is None:
        raise ValueError('`score="cls_attention"` needs `cls_attention` of shape (batch, tokens), got None.')
    if cls_attention.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`cls_attention` must have shape (batch, tokens) = {tuple(hidden_states.shape[:2])}, "
            f"got {tuple(cls_attention.shape)}."
        )


def _check_projected(projected: torch.Tensor, hidden_states: torch.Tensor) -> None:
    shape = tuple(hidden_states.shape[:2])
    if projected.dim() != 3 or tuple(projected.shape[:2]) != shape or not projected.is_floating_point():
        raise ValueError(
            f"`projected` must be a floating tensor of shape (batch, tokens, dim) = {(*shape, 'dim')}, "
            f"got shape {tuple(projected.shape)} and {projected.dtype}."
        )


def _check_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def _check_lambda(nms_lambda: float | str | None) -> None:
    number = isinstance(nms_lambda, Real) and not isinstance(nms_lambda, bool) and math.isfinite(nms_lambda)
    if not (nms_lambda is None or nms_lambda == "auto" or number):
        raise ValueError(f'`nms_lambda` must be a finite number, None (N / 32) or "auto", got {nms_lambda!r}.')
