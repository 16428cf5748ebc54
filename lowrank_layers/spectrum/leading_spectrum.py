"""The leading singular values and the norms of one matrix, measured again and again while it changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import full_precision, krylov_svd, scaled_to_unit, working_dtype

TOLERANCE = 0.05
"""Relative residual ``||A v - s u|| / s``: a bound of 2.5 % on the error of ``s``, which is quadratic in the residual
where singular values are apart, and so far smaller."""
DEPTH = 4
"""Number of blocks of a Krylov basis: with four, one pass is mostly enough, also for new gradients."""

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LeadingSpectrum:
    """The leading singular values and the Frobenius norm of a matrix.

    Args:
        singular_values: the leading ones, descending; empty if the matrix has NaN or Inf entries.
        frobenius_norm: root of the sum of the squared entries; NaN if the matrix has NaN or Inf entries.

    Examples:
        >>> spectrum = lr.LeadingSpectrum((4.0, 2.0), frobenius_norm=5.0)
        >>> spectrum.spectral_norm, spectrum.stable_rank, round(spectrum.energy, 2)
        (4.0, 1.5625, 0.8)
    """

    singular_values: tuple[float, ...]
    frobenius_norm: float

    @property
    def spectral_norm(self) -> float:
        """The largest singular value; NaN if the matrix has NaN or Inf entries."""
        return self.singular_values[0] if self.singular_values else math.nan

    @property
    def stable_rank(self) -> float:
        """``||W||_F^2 / ||W||_2^2``, between 1 and the rank; 0 for a matrix of zeros."""
        return (self.frobenius_norm / self.spectral_norm) ** 2 if self.spectral_norm != 0 else 0.0

    @property
    def energy(self) -> float:
        """The part of ``||W||_F^2`` that the leading singular values hold, from 0 to 1; 0 for a matrix of zeros."""
        held = sum((value / self.frobenius_norm) ** 2 for value in self.singular_values) if self.frobenius_norm else 0.0
        return min(1.0, held) if self.singular_values else math.nan


@full_precision
def leading_spectrum(
    matrix: Tensor, k: int, seed: int = 0, start: Triplets | None = None
) -> tuple[LeadingSpectrum, Triplets | None]:
    """Measures a matrix, and returns the triplets from which the next measurement starts.

    Args:
        matrix: ``[m, n]``.
        k: number of singular values; all of a matrix that has fewer.
        seed: seed of the random directions.
        start: the triplets of the measurement before.
    """
    unit, scale = scaled_to_unit(matrix.to(working_dtype(matrix)))
    frobenius = float(torch.linalg.vector_norm(unit))
    if not math.isfinite(frobenius):
        return LeadingSpectrum((), math.nan), start
    k = min(k, *unit.shape)
    triplets = krylov_svd(unit, k, oversample=8, depth=DEPTH, seed=seed, tolerance=TOLERANCE, start=start)
    return LeadingSpectrum(tuple(scale * value for value in triplets[1].tolist()), scale * frobenius), triplets
