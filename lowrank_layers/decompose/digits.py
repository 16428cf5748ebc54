"""Row and column indices of a matrix in mixed radix, as a block tensor train reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checks import check_integer
from ..errors import LowRankError

Split = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes of the digits of rows and columns: ``(n_1, ..., n_K), (d_1, ..., d_K)``, the slowest first."""


def split_digits(rows: int, columns: int, order: int, owner: str) -> Split:
    """Splits the indices of a matrix into ``order`` digits each.

    Rows descend and columns ascend, so that the products ``n_k * d_k`` are as equal as possible. Rows are filled up to
    the smallest product of nearly equal digits; columns are split exactly.

    Args:
        rows: number of rows.
        columns: number of columns.
        order: number of digits.
        owner: name of the caller, for the error message.

    Examples:
        >>> split_digits(50_000, 768, 3, "TensorizedEmbedding")
        ((37, 37, 37), (8, 8, 12))
    """
    check_integer(order, owner, "order", 2)
    return _split_rows(rows, order), _split_columns(columns, order)


def split_exactly(rows: int, columns: int, order: int, owner: str) -> Split:
    """Splits the indices of a matrix into ``order`` digits each, whose products are its sides.

    Rows descend and columns ascend, as in :func:`split_digits`; a prime side has digits of size 1 but for one.

    Args:
        rows: number of rows.
        columns: number of columns.
        order: number of digits.
        owner: name of the caller, for the error message.

    Examples:
        >>> split_exactly(120, 256, 2, "TensorizedLinear")
        ((12, 10), (16, 16))
    """
    check_integer(order, owner, "order", 2)
    return _split_columns(rows, order)[::-1], _split_columns(columns, order)


def check_split(split: Sequence[Sequence[int]], rows: int, columns: int, owner: str, *, exact: bool = False) -> Split:
    """Returns a split as tuples of integers, or raises if it does not fit a matrix of that shape.

    Args:
        split: digits of the rows and of the columns.
        rows: number of rows.
        columns: number of columns.
        owner: name of the caller, for the error message.
        exact: whether the digits must count the rows exactly.
    """
    try:
        n, d = (tuple(int(digit) for digit in side) for side in split)
    except (TypeError, ValueError):
        n, d = (), ()
    fits = len(n) == len(d) > 1 and min(*n, *d) > 0 and math.prod(n) >= rows and math.prod(d) == columns
    fits = fits and not (exact and math.prod(n) > rows)
    if not fits:
        raise LowRankError(
            f"{owner}: got split {split!r}, expected two tuples of the same length, of at least 2, whose products are"
            f" {'exactly' if exact else 'at least'} {rows} (the rows) and exactly {columns} (the columns)."
        )
    return n, d


def tensorize(matrix: Tensor, split: Split) -> Tensor:
    """Reshapes a matrix into a tensor with one mode per pair of digits, filling up missing rows with zeros.

    Shape:
        ``[n, d_1 * ... * d_K]`` to ``[n_1 * d_1, ..., n_K * d_K]``.
    """
    n, d = split
    order = len(n)
    if len(matrix) < math.prod(n):
        matrix = torch.cat([matrix, matrix.new_zeros(math.prod(n) - len(matrix), matrix.shape[1])])
    tensor = matrix.reshape(*n, *d).permute([axis for k in range(order) for axis in (k, order + k)])
    return tensor.reshape([a * b for a, b in zip(n, d, strict=True)])


def digit_marginals(weights: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The weight of each value of each digit, one on average; their product is the best one that digits can give."""
    full = weights.new_zeros(torch.Size(sizes).numel())
    full[: len(weights)] = weights
    full = full.reshape(sizes)
    sums = [full.sum([other for other in range(len(sizes)) if other != axis]) for axis in range(len(sizes))]
    return [(each / each.mean()).clamp_min(1e-6) for each in sums]


def _split_rows(rows: int, order: int) -> tuple[int, ...]:
    """Returns ``order`` digits ``b`` and ``b + 1``, descending, with the smallest product of at least ``rows``."""
    base = max(1, int(rows ** (1 / order)))
    while (base + 1) ** order <= rows:
        base += 1
    while base > 1 and base**order > rows:
        base -= 1
    more = next(k for k in range(order + 1) if (base + 1) ** k * base ** (order - k) >= rows)
    return (base + 1,) * more + (base,) * (order - more)


def _split_columns(columns: int, order: int) -> tuple[int, ...]:
    """Returns the ``order`` factors of ``columns`` with the smallest sum, ascending."""
    return min(_factorizations(columns, order, 1), key=sum)


def _factorizations(number: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yields all ascending factorizations of a number into ``count`` factors of at least ``least``."""
    if count == 1:
        yield (number,)
        return
    for factor in range(least, int(number ** (1 / count) + 1e-9) + 1):
        if number % factor == 0:
            for rest in _factorizations(number // factor, count - 1, factor):
                yield factor, *rest
