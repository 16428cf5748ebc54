"""What a factorization leaves out of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LowRankError
from ..factors import Factorization
from ..layers import FactoredModule
from ..linalg import check_tensor, full_precision, working_dtype
from .matrix_spectrum import MatrixSpectrum
from .table import shown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class ResidualReport:
    """What :func:`residual_report` found; it prints as a table.

    Args:
        relative_error: ``||W - V|| / ||W||`` in the Frobenius norm.
        best_error: the least such error of any matrix of the rank of ``V``, after Eckart and Young.
        spectral_error: ``||W - V|| / ||W||`` in the spectral norm.
        rank: rank of ``V``: its singular values above rounding.
        largest: largest magnitude of an entry of ``W - V``.
        mean: mean of the entries of ``W - V``.
        dense: number of entries of ``W``.
        stored: number of entries that the factors store; ``None`` where they are given as a plain tensor.
        residual: spectrum of ``W - V``.
    """

    relative_error: float
    best_error: float
    spectral_error: float
    rank: int
    largest: float
    mean: float
    dense: int
    stored: int | None
    residual: MatrixSpectrum

    @property
    def explained(self) -> float:
        """Fraction of the sum of squares that is explained, ``1 - relative_error^2``."""
        return 1 - self.relative_error**2

    def __str__(self) -> str:
        rows = [
            ("relative error (Frobenius)", shown(self.relative_error)),
            (f"least of rank {self.rank}", shown(self.best_error)),
            ("relative error (spectral)", shown(self.spectral_error)),
            ("energy explained", f"{self.explained:.2%}"),
            ("largest entry", shown(self.largest)),
            ("mean entry", shown(self.mean)),
            ("stable rank", shown(self.residual.stable_rank)),
            ("effective rank", shown(self.residual.effective_rank)),
        ]
        if self.stored is not None:
            rows.append(("entries", f"{self.stored:,} of {self.dense:,}"))
        return table(("residual", ""), rows)

    def plot(self) -> Figure:
        """Plots the singular values of the residual, and the energy of it that each further rank would keep.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        return self.residual.plot()


@full_precision
@torch.no_grad()
def residual_report(dense: Tensor, factors: Factorization | FactoredModule | Tensor) -> ResidualReport:
    r"""Compares a tensor with its factorization: how much is left, and how it is spread.

    White noise of shape ``[m, n]`` has a stable rank near :math:`mn / (\sqrt{m} + \sqrt{n})^2`. A residual whose stable
    rank is far below it still has a direction that a larger rank would capture.

    Args:
        dense: the tensor that was factorized; its first dimension is taken for rows.
        factors: its factorization, the layer that holds it, or the approximation itself.

    Raises:
        LowRankError: for tensors of different shapes, or values that are not finite.

    Examples:
        >>> weight = torch.randn(40, 60)
        >>> report = lr.residual_report(weight, lr.svd(weight, 10))
        >>> report.rank, report.stored, abs(report.relative_error - report.best_error) < 1e-6
        (10, 1010, True)
    """
    weight = check_tensor(dense, "residual_report")
    value = factors.factors() if isinstance(factors, FactoredModule) else factors
    stored = None if isinstance(value, Tensor) else value.numel()
    approximation = check_tensor(value if isinstance(value, Tensor) else value.to_dense(), "residual_report")
    if approximation.shape != weight.shape:
        raise LowRankError(
            f"residual_report: got factors of shape {tuple(approximation.shape)}, expected that of the dense tensor,"
            f" {tuple(weight.shape)}."
        )
    rank = MatrixSpectrum.of(approximation.flatten(1)).numerical_rank(working_dtype(approximation))
    error = weight.double() - approximation.double()
    whole, residual = MatrixSpectrum.of(weight.flatten(1)), MatrixSpectrum.of(error.flatten(1))
    return ResidualReport(
        relative_error=_ratio(residual.frobenius_norm, whole.frobenius_norm),
        best_error=whole.error_at(rank),
        spectral_error=_ratio(residual.spectral_norm, whole.spectral_norm),
        rank=rank,
        largest=float(error.abs().max()),
        mean=float(error.mean()),
        dense=weight.numel(),
        stored=stored,
        residual=residual,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else part
