"""Square roots of second-moment matrices, which are symmetric, positive semi-definite and often singular."""

from typing import NamedTuple

import torch
from torch import Tensor


class Root(NamedTuple):
    """An upper triangular ``L`` with ``L^T L = A``; a vector stands for a diagonal one.

    Any such root serves: ``||L M||`` is the same for all of them.
    """

    factor: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """``L @ matrix``."""
        return self.factor[:, None] * matrix if self.factor.ndim == 1 else self.factor @ matrix

    def divide(self, matrix: Tensor) -> Tensor:
        """``L^-1 @ matrix``."""
        if self.factor.ndim == 1:
            return matrix / self.factor[:, None]
        solution: Tensor = torch.linalg.solve_triangular(self.factor, matrix, upper=True)
        return solution

    def solve(self, matrix: Tensor) -> Tensor:
        """``A^-1 @ matrix``."""
        if self.factor.ndim == 1:
            return matrix / self.factor.square()[:, None]
        return torch.cholesky_solve(matrix, self.factor, upper=True)


def psd_root(moment: Tensor, *, floor: float = 1e-12) -> Root:
    """The root in fp64, of a moment whose eigenvalues are kept from vanishing.

    The moments of real activations are singular (dead units, fewer samples than features), so a floor is always added;
    where rounding makes even that indefinite, the eigenvalues are clamped instead.

    Args:
        moment: symmetric matrix ``[n, n]``, or ``[n]`` for a diagonal one; zero means no preference, the identity.
        floor: added to the diagonal, relative to its largest entry.
    """
    moment = moment.double()
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    largest = diagonal.max()
    if not largest > 0:
        return Root(torch.ones_like(diagonal))
    if moment.ndim == 1:
        return Root(moment.clamp_min(largest * floor).sqrt())
    lifted = (moment + moment.mT) / 2
    lifted.diagonal().add_(largest * floor)
    lower, failed = torch.linalg.cholesky_ex(lifted)
    if not bool(failed):
        return Root(lower.mT)
    values, vectors = torch.linalg.eigh(lifted)
    return Root(torch.linalg.qr((vectors * values.clamp_min(largest * floor).sqrt()).mT).R)


def damp(moment: Tensor, amount: float) -> Tensor:
    """``A + amount * mean eigenvalue * I``: the directions that were never seen stay regular."""
    if moment.ndim == 1:
        return moment + amount * moment.mean()
    damped = moment.clone()
    damped.diagonal().add_(amount * moment.diagonal().mean())
    return damped
