"""PSCA (section 3.2): the principal components over the token axis.

On a CPU the components of one view after another come from `top_eigenvectors`, which goes on until it is exact.
Elsewhere those of all views come from `iterated_eigenvectors`: a fixed number of operations, without a wait.
"""

import math

import torch

from .exact import gram, is_batched, mean_of_whole, power_of_two, product


EPS = torch.finfo(torch.float32).eps
KRYLOV_BLOCK = 16
WHOLE_REGISTERS = 16
GUARD = 32
SMALLEST = 2.0**-18  # eigenvalue beside the largest one, below which nothing is sought
CHUNKS = (8, 32)
STEPS = 2.0**24  # of the sigmoid between 0 and 1


def principal_components(
    features: torch.Tensor, finite: torch.Tensor, num_components: int, center: str, lengths: torch.Tensor
) -> torch.Tensor:
    """
    |V| of the top components over the token axis (PSCA, equations 1 and 2).

    V are the eigenvectors of the tokens x tokens Gram matrix of the centred sigmoid features. Null components, whose
    eigenvalue is rounding error beside the largest one or beside the entries before centring, are zero.

    Args:
        features (`torch.FloatTensor` of shape `(views, tokens, dim)`): zero where not finite.
        finite (`torch.BoolTensor` of shape `(views, tokens)`): which tokens count.
        num_components (`int`): K, at most `tokens`.
        center (`str`): `"tokens"`, or the release's `"features"`.
        lengths (`torch.LongTensor` of shape `(views, 1)`): T of each view.

    Returns:
        `torch.FloatTensor` of shape `(views, tokens, num_components)`, the largest component first.
    """
    if is_batched(features):
        return _components_of_all(features, finite, num_components, center, lengths)
    return torch.stack([_components_of_one(*view, num_components, center) for view in zip(features, finite)])


def _components_of_one(features: torch.Tensor, finite: torch.Tensor, num_components: int, center: str) -> torch.Tensor:
    tokens, dim = features.shape
    rescaled = features.sigmoid()
    if center == "tokens":
        rescaled -= product(finite.float(), rescaled) / finite.sum().clamp(min=1)
    else:
        rescaled -= rescaled.mean(1, keepdim=True)
    if not finite.all():
        rescaled *= finite[:, None]
    # Equal tokens are to stay equal, but products round them differently at their edge, and with a single vector.
    if tokens % WHOLE_REGISTERS:
        rescaled = torch.nn.functional.pad(rescaled, (0, 0, 0, -tokens % WHOLE_REGISTERS))
    eigenvalues, eigenvectors = top_eigenvectors(rescaled, min(max(num_components, 2), tokens))
    null = eigenvalues <= tokens * EPS * eigenvalues[0].clamp(min=tokens * dim * EPS)
    return eigenvectors[:tokens, :num_components].abs().masked_fill(null[:num_components], 0)


def _components_of_all(
    features: torch.Tensor, finite: torch.Tensor, num_components: int, center: str, lengths: torch.Tensor
) -> torch.Tensor:
    dim = features.shape[2]
    # In whole steps of 2^-24 the mean is a sum of whole numbers: no order of summation changes it.
    steps = (features.sigmoid() * STEPS).round() * finite[..., None]
    if center == "tokens":
        centred = steps - mean_of_whole(steps, finite.sum(1)[:, None, None].clamp(min=1), 1)
    else:
        centred = steps - mean_of_whole(steps, dim, 2)
    centred = centred * finite[..., None]
    unit = 2 * power_of_two(centred.abs().amax((1, 2)).clamp(min=1))[:, None]
    eigenvalues, eigenvectors = iterated_eigenvectors(gram(centred / unit[..., None]), num_components, lengths)
    floor = lengths * (dim * EPS) * (STEPS / unit).square()
    null = eigenvalues <= lengths * EPS * eigenvalues[:, :1].maximum(floor)
    return eigenvectors.abs().masked_fill(null[:, None], 0)


def top_eigenvectors(features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest eigenvalues of the Gram matrix M = F F^T of the features F, and their eigenvectors.

    Block Krylov: the products of M with the means of 16 stretches of its rows, made orthogonal before and after they
    are scaled, span at least 2.5 * count + 38 directions, and the small problem inside them is solved exactly. The
    eigenvectors v found there are multiplied by M once more: M v / w is closer to the truth, and has equal entries for
    equal rows of F. M itself is never formed: a product with it is two thin ones with F.

    The answer stands if every residual |M v - w v| is at most 2^-8 w_K and 2^-13 w_1, or sqrt(tokens) * eps * w_1,
    the rounding error of the products themselves. If not, half as many directions are added; if still not (spectra
    without decay), and where the span would be a third of the whole space, all eigenvectors are computed.

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
        block = product(features, features[: KRYLOV_BLOCK * length].reshape(KRYLOV_BLOCK, length, -1).mean(1).T)
        basis = features.new_empty((steps + steps // 2) * KRYLOV_BLOCK, tokens)
        products = torch.empty_like(basis)
        for step in range(steps + steps // 2):
            known, size = basis[: step * KRYLOV_BLOCK], (step + 1) * KRYLOV_BLOCK
            block = product(known.T, product(known, block), minus_from=block)
            block = torch.linalg.qr(block).Q
            block = product(known.T, product(known, block), minus_from=block)
            basis[len(known) : size] = block.T
            block = product(features, product(block.T, features).T)
            products[len(known) : size] = block.T
            if step + 1 not in (steps, steps + steps // 2):
                continue
            eigenvalues, rotation = torch.linalg.eigh(product(basis[:size], products[:size].T))
            eigenvalues, rotation = eigenvalues.flip(0)[:count, None], rotation.flip(1)[:, :count].T
            images = product(rotation, products[:size])
            residuals = torch.linalg.vector_norm(images - eigenvalues * product(rotation, basis[:size]), dim=1)
            tolerance = (2**-8 * eigenvalues[-1]).minimum(2**-13 * eigenvalues[0])
            tolerance = tolerance.maximum(math.sqrt(tokens) * EPS * eigenvalues[0])
            if residuals.max() <= tolerance:
                return eigenvalues[:, 0], (images / eigenvalues).T
    gram_matrix = product(features, features.T)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram_matrix)
    eigenvalues, eigenvectors = eigenvalues.flip(0)[:count], eigenvectors.flip(1)[:, :count]
    return eigenvalues, product(eigenvectors.T, gram_matrix).T / eigenvalues


def iterated_eigenvectors(
    matrices: torch.Tensor, count: int, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The largest eigenvalues of symmetric matrices, and their eigenvectors, by simultaneous iteration.

    A block of count + 32 directions starts as cosines. A round turns every pair of them by the Jacobi angle of its
    2 x 2 problem, all at once; applies the Chebyshev polynomial of the matrix that is small up to the least eigenvalue
    in the block and grows above; and makes the block orthogonal by Cholesky. 10 rounds of degree 2 group all tokens of
    photographs and of matrices with any decay like an exact solver, and 98 in 100 of white noise, which has none.

    It computes in fp64, which no setting reduces (14 rounds of degree 1 in fp32 where a device has no fp64), and
    takes 8 or 32 views at a time, zeros filling up: a library that chooses its kernel by the shapes, and may round
    differently in each, then always has the same. Compiled code takes the batch as it is.

    Args:
        matrices (`torch.FloatTensor` of shape `(views, tokens, tokens)`).
        count (`int`): K, at most `tokens`.
        lengths (`torch.LongTensor` of shape `(views, 1)`): T of each view; what follows is zero.

    Returns:
        Eigenvalues of shape `(views, count)`, falling, and eigenvectors of shape `(views, tokens, count)`, in fp32.
    """
    dtype = torch.float64 if has_fp64(matrices.device) else torch.float32
    matrices, lengths = matrices.to(dtype), lengths.to(dtype)
    if torch.compiler.is_compiling():
        eigenvalues, eigenvectors = _iterate(matrices, lengths, count)
    else:
        views = len(matrices)
        size = next((size for size in CHUNKS if views <= size), CHUNKS[-1])
        matrices = torch.nn.functional.pad(matrices, (0, 0, 0, 0, 0, -views % size))
        lengths = torch.nn.functional.pad(lengths, (0, 0, 0, -views % size), value=1)
        parts = [_iterate(*part, count) for part in zip(matrices.split(size), lengths.split(size))]
        eigenvalues, eigenvectors = (torch.cat(part)[:views] for part in zip(*parts))
    return eigenvalues.float(), eigenvectors.float()


def has_fp64(device: torch.device) -> bool:
    """Whether a device computes in fp64."""
    if torch.compiler.is_compiling():
        return device.type != "mps"
    try:
        torch.empty(0, device=device, dtype=torch.float64)
    except (TypeError, RuntimeError):
        return False
    return True


def _iterate(matrices: torch.Tensor, lengths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, dtype, device = matrices.shape[-1], matrices.dtype, matrices.device
    width, limits = min(count + GUARD, tokens), torch.finfo(dtype)
    rounds, degree = (10, 2) if dtype == torch.float64 else (14, 1)
    eye = torch.eye(width, device=device, dtype=dtype)
    is_diagonal = eye > 0
    # Beside the squared lengths of the columns, so that rounding leaves no negative pivot, and for a column of zeros.
    loading, least = 1 + 8 * limits.eps * tokens * eye, limits.tiny**0.75 * eye

    def orthogonal(block: torch.Tensor) -> torch.Tensor:
        factor = torch.linalg.cholesky_ex(torch.addcmul(least, block.mT @ block, loading)).L
        return torch.linalg.solve_triangular(factor.mT, block, upper=True, left=False)

    # Cosines over the tokens, as the components of smooth pictures are.
    row, column = torch.arange(tokens, device=device)[:, None], torch.arange(width, device=device)
    lengths = lengths[..., None]
    block = orthogonal(torch.cos((row + 0.5) * column * (math.pi / lengths)) * (row < lengths))
    for _ in range(rounds):
        image = matrices @ block
        small = block.mT @ image
        values = small.diagonal(dim1=1, dim2=2)
        turn = (small / (values[:, None] - values[:, :, None])).clamp(-0.5, 0.5).nan_to_num()
        turn = turn.masked_fill(is_diagonal, 1)
        # The largest first, for Cholesky takes from each column what is in those before.
        values, order = values.sort(dim=1, descending=True, stable=True)
        turn = turn.gather(2, order[:, None].expand(-1, width, -1))
        bound = values[:, -1:].maximum((SMALLEST * values[:, :1]).clamp(min=limits.tiny**0.25))[..., None]
        before = block @ turn
        block = torch.baddbmm(before, image, turn / bound, beta=-1, alpha=2)
        if degree == 2:
            block = torch.baddbmm(torch.add(before, block, alpha=2), matrices, block / bound, beta=-1, alpha=4)
        block = orthogonal(block)
    image = matrices @ block
    values, order = (block * image).sum(1).sort(dim=1, descending=True, stable=True)
    order, values = order[:, None, :count].expand(-1, tokens, -1), values[:, :count]
    return values, (image.gather(2, order) / values[:, None]).nan_to_num()
