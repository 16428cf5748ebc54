"""Square roots of second-moment matrices, which are symmetric positive semi-definite and often singular."""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 512
"""Rows and columns of a block of a triangular matrix."""


class Root(NamedTuple):
    """A root ``L`` of a matrix ``A = L^T L``; ``||L M||`` is the same for all roots of ``A``.

    Args:
        factor: upper triangular ``[n, n]``, or ``[n]`` for a diagonal root.
    """

    factor: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """Computes ``L @ matrix``."""
        if self.factor.ndim == 1:
            return self.factor[:, None] * matrix
        parts = enumerate(self.factor.split(_BLOCK))
        return torch.cat([rows[:, i * _BLOCK :] @ matrix[i * _BLOCK :] for i, rows in parts])  # without the zeros

    def divide(self, matrix: Tensor) -> Tensor:
        """Computes ``L^-1 @ matrix``."""
        if self.factor.ndim == 1:
            return matrix / self.factor[:, None]
        solution: Tensor = torch.linalg.solve_triangular(self.factor, matrix, upper=True)
        return solution

    def divide_columns(self, matrix: Tensor) -> Tensor:
        """Computes ``matrix @ L^-1``."""
        if self.factor.ndim == 1:
            return matrix / self.factor
        solution: Tensor = torch.linalg.solve_triangular(self.factor, matrix, upper=True, left=False)
        return solution

    def solve(self, matrix: Tensor) -> Tensor:
        """Computes ``A^-1 @ matrix``."""
        if self.factor.ndim == 1:
            return matrix / self.factor.square()[:, None]
        return torch.cholesky_solve(matrix, self.factor, upper=True)

    def after(self, rows: Tensor) -> Tensor:
        """Computes ``rows @ L``."""
        if self.factor.ndim == 1:
            return rows * self.factor
        parts = self.factor.split(_BLOCK, 1)
        ends = [min((i + 1) * _BLOCK, len(self.factor)) for i in range(len(parts))]
        return torch.cat([rows[:, :end] @ part[:end] for end, part in zip(ends, parts, strict=True)], 1)

    def solve_rows_(self, rows: Tensor) -> Tensor:
        """Computes ``rows @ A^-1`` in place, without a copy of the root, and returns it."""
        if self.factor.ndim == 1:
            return rows.div_(self.factor.square())
        torch.linalg.solve_triangular(self.factor, rows, upper=True, left=False, out=rows)
        torch.linalg.solve_triangular(self.factor.mT, rows, upper=False, left=False, out=rows)
        return rows


class LowRankRoot(NamedTuple):
    r"""The root :math:`L = (I + Q h Q^T) D^{1/2}` of ``A = D + F F^T = L^T L``, without any ``n x n`` matrix.

    With :math:`D^{-1/2} F = Q s P^T` it is :math:`h = \sqrt{1 + s^2} - 1`.

    Args:
        scale: ``D^(1/2)``, ``[n]``.
        directions: ``Q``, ``[n, k]``.
        gains: ``sqrt(1 + s^2)``, ``[k]``.
    """

    scale: Tensor
    directions: Tensor
    gains: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """Computes ``L @ matrix``."""
        return self._turned(self.scale[:, None] * matrix, self.gains)

    def divide(self, matrix: Tensor) -> Tensor:
        """Computes ``L^-1 @ matrix``."""
        return self._turned(matrix, 1 / self.gains) / self.scale[:, None]

    def divide_columns(self, matrix: Tensor) -> Tensor:
        """Computes ``matrix @ L^-1``."""
        return self._turned((matrix / self.scale).mT, 1 / self.gains).mT

    def solve(self, matrix: Tensor) -> Tensor:
        """Computes ``A^-1 @ matrix``."""
        return self._turned(matrix / self.scale[:, None], self.gains**-2) / self.scale[:, None]

    def _turned(self, matrix: Tensor, gains: Tensor) -> Tensor:
        """``(I + Q (gains - 1) Q^T) @ matrix``."""
        inner = self.directions.mT @ matrix
        return torch.addmm(matrix, self.directions, (gains - 1)[:, None] * inner)


def low_rank_root(diagonal: Tensor, factor: Tensor, *, floor: float = 1e-12) -> LowRankRoot:
    """Computes a root of ``diag(diagonal) + factor factor^T``.

    Args:
        diagonal: ``[n]``, not negative; zeros are lifted.
        factor: ``[n, k]``.
        floor: least entry of the diagonal, relative to the largest entry of the whole diagonal.
    """
    largest = (diagonal + factor.square().sum(1)).max()
    scale = diagonal.clamp_min(floor * largest).clamp_min(torch.finfo(diagonal.dtype).tiny).sqrt()
    q, r = torch.linalg.qr(factor / scale[:, None])
    u, s, _ = torch.linalg.svd(r)
    return LowRankRoot(scale, q @ u, (1 + s.square()).sqrt())


def psd_root(moment: Tensor, *, floor: float = 1e-12, ridge: float | Tensor = 0.0) -> Root:
    """Computes a root of a second moment in fp64, in the memory of one matrix beside the moment.

    Moments of real activations are often singular (dead units, fewer samples than features), so a small multiple of the
    identity is always added. Where rounding makes even that indefinite, eigenvalues are clamped instead.

    Args:
        moment: symmetric matrix ``[n, n]``, or ``[n]`` for a diagonal one; zero is treated as the identity.
        floor: value added to the diagonal, relative to its largest entry.
        ridge: value added to the diagonal before that.
    """
    diagonal = (moment if moment.ndim == 1 else moment.diagonal()).double() + ridge
    largest = diagonal.max()
    if not largest > 0:
        return Root(torch.ones_like(diagonal))
    if moment.ndim == 1:
        return Root(diagonal.clamp_min(largest * floor).sqrt())
    shift = ridge + largest * floor
    lifted = _upper(moment, shift)
    # LAPACK reads columns first, to which the upper triangle is the lower one, and overwrites it
    failed = torch.empty((), dtype=torch.int32, device=moment.device)
    torch.linalg.cholesky_ex(lifted.mT, out=(lifted.mT, failed))
    if not bool(failed):
        return Root(lifted)
    values, vectors = torch.linalg.eigh(_upper(moment, shift), UPLO="U")
    return Root(torch.linalg.qr((vectors * values.clamp_min(largest * floor).sqrt()).mT).R)


def _upper(moment: Tensor, shift: float | Tensor) -> Tensor:
    """The upper triangle of ``(A + A^T) / 2 + shift * I`` in fp64, new; nothing is said of the blocks below it."""
    upper = torch.empty(moment.shape, dtype=torch.float64, device=moment.device).copy_(moment)
    starts = range(0, len(upper), _BLOCK)
    for row in starts:
        for column in range(row, len(upper), _BLOCK):
            one, other = slice(row, row + _BLOCK), slice(column, column + _BLOCK)
            upper[one, other] = (upper[one, other] + upper[other, one].mT).div_(2)
    upper.diagonal().add_(shift)
    return upper


def damp(moment: Tensor, amount: float) -> Tensor:
    """Computes ``A + amount * mean eigenvalue * I``, which is regular also along directions that were never seen."""
    if moment.ndim == 1:
        return moment + amount * moment.mean()
    damped = moment.clone()
    damped.diagonal().add_(amount * moment.diagonal().mean())
    return damped
