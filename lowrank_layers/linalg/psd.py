"""Square roots of second-moment matrices, which are symmetric positive semi-definite and often singular."""

from typing import NamedTuple

import torch
from torch import Tensor


class Root(NamedTuple):
    """A root ``L`` of a matrix ``A = L^T L``; ``||L M||`` is the same for all roots of ``A``.

    Args:
        factor: upper triangular ``[n, n]``, or ``[n]`` for a diagonal root.
    """

    factor: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """Computes ``L @ matrix``."""
        return self.factor[:, None] * matrix if self.factor.ndim == 1 else self.factor @ matrix

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


def psd_root(moment: Tensor, *, floor: float = 1e-12) -> Root:
    """Computes a root of a second moment in fp64.

    Moments of real activations are often singular (dead units, fewer samples than features), so a small multiple of the
    identity is always added. Where rounding makes even that indefinite, eigenvalues are clamped instead.

    Args:
        moment: symmetric matrix ``[n, n]``, or ``[n]`` for a diagonal one; zero is treated as the identity.
        floor: value added to the diagonal, relative to its largest entry.
    """
    moment = moment.double()
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    largest = diagonal.max()
    if not largest > 0:
        return Root(torch.ones_like(diagonal))
    if moment.ndim == 1:
        return Root(moment.clamp_min(largest * floor).sqrt())
    lifted = (moment + moment.mT).div_(2)
    lifted.diagonal().add_(largest * floor)
    lower, failed = torch.linalg.cholesky_ex(lifted)
    if not bool(failed):
        return Root(lower.mT)
    values, vectors = torch.linalg.eigh(lifted)
    return Root(torch.linalg.qr((vectors * values.clamp_min(largest * floor).sqrt()).mT).R)


def damp(moment: Tensor, amount: float) -> Tensor:
    """Computes ``A + amount * mean eigenvalue * I``, which is regular also along directions that were never seen."""
    if moment.ndim == 1:
        return moment + amount * moment.mean()
    damped = moment.clone()
    damped.diagonal().add_(amount * moment.diagonal().mean())
    return damped
