"""Rows of a tall matrix from which all others follow with small coefficients."""

import torch
from torch import Tensor

LARGEST = 1.1
"""Coefficients are at most this large."""


def pivot_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses ``r`` rows of a matrix ``[n, r]`` that span it, and expresses the others by them.

    An LU decomposition with partial pivoting of an orthonormal basis of the columns chooses first. Then a row takes the
    place of a pivot wherever a coefficient is larger than 1.1, which raises the volume of the pivots by that factor
    (Goreinov et al., 2010, maxvol). A matrix of smaller rank than ``r`` gets pivots that span more than it does.

    Args:
        matrix: finite, with no more columns than rows.

    Returns:
        An order of the rows, ``[n]``: the pivots, then the others, both rising; and the coefficients ``[n - r, r]`` of
        the others, in fp64. ``matrix[order[r:]]`` is their product with ``matrix[order[:r]]``.

    Examples:
        >>> order, coefficients = pivot_rows(torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]]))
        >>> order.tolist(), coefficients.round(decimals=6).tolist()
        ([1, 2, 0], [[0.5, 0.5]])
    """
    rows, rank = matrix.shape
    basis = torch.linalg.qr(matrix.double()).Q
    lower_upper, swaps = torch.linalg.lu_factor(basis)
    pivots = _swapped(rows, swaps)[:rank].to(matrix.device)
    square = lower_upper[:rank]
    solved = torch.linalg.solve_triangular(square, basis, upper=True, left=False)
    solved = torch.linalg.solve_triangular(square, solved, upper=False, left=False, unitriangular=True)
    del lower_upper, square
    while solved.numel():
        row, pivot = divmod(int(solved.abs().argmax()), rank)
        largest = float(solved[row, pivot])
        if not abs(largest) > LARGEST:
            break
        change = solved[row].clone()
        change[pivot] -= 1
        solved.addr_(solved[:, pivot].clone(), change, alpha=-1 / largest)
        pivots[pivot] = row
    pivots = pivots.sort().values
    other = torch.ones(rows, dtype=torch.bool, device=matrix.device)
    other[pivots] = False
    others = other.nonzero().flatten()
    # solved anew, without the rounding errors of the exchanges
    coefficients = torch.linalg.solve(basis[pivots], basis[others], left=False)
    return torch.cat([pivots, others]), coefficients


def _swapped(count: int, swaps: Tensor) -> Tensor:
    """The order of rows after LAPACK's swaps, which count from one."""
    order = list(range(count))
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order)
