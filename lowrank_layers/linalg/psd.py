"""Square roots of second-moment matrices, which are symmetric, positive semi-definite and often singular."""

from typing import NamedTuple

import torch
from torch import Tensor


class PowerPair(NamedTuple):
    """``root = A^(1/2)`` and ``inverse = A^(-1/2)``; vectors stand for diagonal matrices."""

    root: Tensor
    inverse: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """``A^(1/2) @ matrix``."""
        return self.root[:, None] * matrix if self.root.ndim == 1 else self.root @ matrix

    def divide(self, matrix: Tensor) -> Tensor:
        """``A^(-1/2) @ matrix``."""
        return self.inverse[:, None] * matrix if self.inverse.ndim == 1 else self.inverse @ matrix


def psd_roots(moment: Tensor, *, floor: float = 1e-6) -> PowerPair:
    """``A^(1/2)`` and ``A^(-1/2)`` in fp64, the eigenvalues clamped from below.

    Never Cholesky: the moments of real activations are singular (dead units, fewer samples than features).

    Args:
        moment: symmetric matrix ``[n, n]``, or ``[n]`` for a diagonal one.
        floor: the smallest eigenvalue that counts, relative to the largest.
    """
    moment = moment.double()
    if moment.ndim == 1:
        values = _clamp(moment, floor)
        return PowerPair(values.sqrt(), values.rsqrt())
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    values = _clamp(values, floor)
    return PowerPair((vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT)


def damp(moment: Tensor, amount: float) -> Tensor:
    """``A + amount * mean eigenvalue * I``: the directions that were never seen stay regular."""
    if moment.ndim == 1:
        return moment + amount * moment.mean()
    damped = moment.clone()
    damped.diagonal().add_(amount * moment.diagonal().mean())
    return damped


def _clamp(values: Tensor, floor: float) -> Tensor:
    """Raises small eigenvalues to the floor; a moment that is zero becomes the identity (no preference)."""
    largest = values.max()
    return values.clamp_min(largest * floor) if largest > 0 else torch.ones_like(values)
