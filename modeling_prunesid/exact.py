"""Products whose result no process-wide setting, batch size or order of summation can change.

On a CPU one view is multiplied at a time, in fp32: `product` leaves the library's fast path where the process allows
it bf16 (`torch.set_float32_matmul_precision`), which it reads and never sets.

Elsewhere (other devices, `torch.compile`, `torch.export`) factors are cut into integers of a few bits. Their products
and sums are integers below 2^24: exact in fp32, in TF32 and in bf16 with fp32 sums, in any order. So the kernel that a
library chooses for a batch makes no difference, and a GPU gives the bits that a CPU gives.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


EXPONENT = 0x7F800000  # of an fp32 number


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether all views are computed at once; on a CPU, eagerly, they are computed one after another."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """fp32 stays fp32; a device that has no autocast needs nothing."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def product(
    left: torch.Tensor,
    right: torch.Tensor,
    minus_from: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`left @ right` on a CPU, fp32 in fp32 whatever the process allows; or `minus_from` less it."""
    is_exact = left.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    if is_exact or 0 in left.shape:
        if minus_from is not None:
            return torch.addmm(minus_from, left, right, alpha=-1)
        return left @ right if out is None else torch.mm(left, right, out=out)
    rows = left.reshape(-1, left.shape[-1])
    if torch.backends.mkl.is_available():
        columns = right.T.contiguous()
        packed = torch.ops.mkl._mkl_reorder_linear_weight(columns, len(rows))
        found = torch.ops.mkl._mkl_linear(rows, packed, columns, None, len(rows))
    else:
        found = (rows.double() @ right.double()).float()
    found = found.view(*left.shape[:-1], right.shape[-1])
    if minus_from is not None:
        return minus_from - found
    return found if out is None else out.copy_(found)


def power_of_two(values: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is at most each positive, normal fp32 value."""
    return (values.view(torch.int32) & EXPONENT).view(torch.float32)


def gram(features: torch.Tensor) -> torch.Tensor:
    """
    F F^T of the features F, the same bits whatever the batch, the device and its settings.

    The entries, cut off at 2^-20 or less, become `levels` integers of `bits` bits and a sign. Products of two levels
    are sums of integers, added up the smallest first; those below the cut are left out.

    Args:
        features (`torch.FloatTensor` of shape `(views, tokens, dim)`): entries in (-1, 1).

    Returns:
        `torch.FloatTensor` of shape `(views, tokens, tokens)`, symmetric.
    """
    parts, bits = _levels(features)
    total: Any = None
    for order in reversed(range(len(parts))):
        terms = []
        for first in range(order // 2 + 1):
            second = order - first
            term = parts[first] @ parts[second].mT
            terms.append(term if first == second else term + term.mT)
        whole = terms[0]
        for term in terms[1:]:
            whole = whole + term
        total = whole if total is None else torch.add(whole, total, alpha=2.0 ** -(bits + 1))
    return total * 2.0 ** (-2 * bits)


def cross(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    L R^T of two kinds of features, as [`gram`] of one kind.

    Args:
        left (`torch.FloatTensor` of shape `(views, tokens, dim)`), right (`(views, others, dim)`): entries in (-1, 1).

    Returns:
        `torch.FloatTensor` of shape `(views, tokens, others)`.
    """
    lefts, bits = _levels(left)
    rights, _ = _levels(right)
    return _by_orders(lefts, rights, bits, lambda first, second: first @ second.mT)


def squares(features: torch.Tensor) -> torch.Tensor:
    """The diagonal `(views, tokens)` of [`gram`], without the rest of it."""
    parts, bits = _levels(features)
    return _by_orders(parts, parts, bits, lambda first, second: (first * second).sum(-1))


def _levels(features: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """The entries of features in (-1, 1) as integers of so many bits and a sign, the largest level first."""
    dim = features.shape[-1]
    bits = min((24 - math.ceil(math.log2(dim))) // 2, 7)
    if bits < 2:
        raise ValueError(
            f"Tokens of {dim} features are too long for exact sums in fp32: at most {2**20} are possible."
        )
    parts, rest = [], features * 2.0**bits
    for _ in range(math.ceil((19 - bits) / (bits + 1)) + 1):
        parts.append(rest.round())
        rest = (rest - parts[-1]) * 2.0 ** (bits + 1)
    return parts, bits


def _by_orders(lefts: list[Any], rights: list[Any], bits: int, multiply: Callable[..., Any]) -> torch.Tensor:
    """The products of all levels that are above the cut, added up the smallest first."""
    total: Any = None
    for order in reversed(range(len(lefts))):
        whole: Any = None
        for first in range(order + 1):
            term = multiply(lefts[first], rights[order - first])
            whole = term if whole is None else whole + term
        total = whole if total is None else torch.add(whole, total, alpha=2.0 ** -(bits + 1))
    return total * 2.0 ** (-2 * bits)


def mean_of_whole(whole: torch.Tensor, count: torch.Tensor | int, dim: int) -> torch.Tensor:
    """The mean of whole numbers over a dimension, rounded to a whole number."""
    total = whole.sum(dim, keepdim=True, dtype=torch.long)
    return ((2 * total + count) // (2 * count)).float()
