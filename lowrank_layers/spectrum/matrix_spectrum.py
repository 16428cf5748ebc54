"""The singular values of one matrix, and the numbers that describe them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..drawing import colour, figure_of, legend, logarithmic, panels, whole_x
from ..linalg import scaled_to_unit
from ..rank import Rank, Spectrum, pair_spectrum
from ..rank.energy import Energy
from ..rank.evbmf import EVBMF
from ..rank.gavish_donoho import GavishDonoho
from ..rank.rule import choose_rank
from .power_law import PowerLaw, fit_power_law

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class MatrixSpectrum:
    """The singular values of one matrix, and what is computed from them.

    Args:
        values: singular values, largest first, in fp64.
        shape: rows and columns of the matrix.

    Examples:
        >>> found = lr.MatrixSpectrum(torch.tensor([3.0, 1.0, 1.0]).double(), (3, 5))
        >>> found.nuclear_norm, found.rank_for_energy(0.9), round(found.stable_rank, 3)
        (5.0, 2, 1.222)
    """

    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: Tensor) -> MatrixSpectrum:
        """Computes the spectrum of a matrix.

        Args:
            matrix: ``[m, n]``.
        """
        return cls(torch.linalg.svdvals(matrix.detach().double()), (matrix.shape[0], matrix.shape[1]))

    @property
    def spectral_norm(self) -> float:
        """The largest singular value."""
        return float(self.values[0])

    @property
    def nuclear_norm(self) -> float:
        """The sum of the singular values."""
        return float(self.values.sum())

    @property
    def frobenius_norm(self) -> float:
        """The root of the sum of the squared singular values."""
        return float(torch.linalg.vector_norm(self.values))

    @property
    def condition_number(self) -> float:
        """The largest singular value over the smallest; infinite for a singular matrix."""
        least = float(self.values[-1])
        return self.spectral_norm / least if least > 0 else math.inf

    @property
    def stable_rank(self) -> float:
        """``||W||_F^2 / ||W||_2^2``; 0 for a matrix of zeros."""
        unit = self._unit
        return float(unit.square().sum()) if self.spectral_norm > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """``exp(-sum p_i log p_i)`` with ``p_i = s_i / sum s_j`` (Roy and Vetterli, 2007); 0 for a matrix of zeros."""
        unit = self._unit
        if self.spectral_norm == 0:
            return 0.0
        return float(torch.special.entr(unit / unit.sum()).sum().exp())

    @property
    def participation_ratio(self) -> float:
        """``(sum s_i^2)^2 / sum s_i^4``, a count of the directions that hold the energy; 0 for a matrix of zeros."""
        energy = self._unit.square()
        return float(energy.sum().square() / energy.square().sum()) if self.spectral_norm > 0 else 0.0

    @property
    def cumulative_energy(self) -> Tensor:
        """Fraction of the squared singular values up to each one, ``[min(m, n)]``."""
        energy = self._unit.square().cumsum(0)
        return energy / energy[-1].clamp_min(torch.finfo(torch.float64).tiny)

    def numerical_rank(self, dtype: torch.dtype) -> int:
        """Returns the number of singular values above the rounding of a dtype, as ``torch.linalg.matrix_rank`` counts.

        Args:
            dtype: the dtype in which the matrix was computed.
        """
        return int((self.values > max(self.shape) * torch.finfo(dtype).eps * self.values[0]).sum())

    def rank_for_energy(self, fraction: float) -> int:
        """Returns the least rank that keeps a fraction of the sum of squared singular values.

        Args:
            fraction: in (0, 1].
        """
        return Energy(fraction)(self._rule_input)

    def error_at(self, rank: int) -> float:
        """Returns the least relative error in the Frobenius norm of a matrix of that rank.

        Args:
            rank: from 0 to the number of singular values.
        """
        energy = self._unit.square()
        return float((energy[rank:].sum() / energy.sum()).sqrt()) if self.spectral_norm > 0 else 0.0

    @property
    def gavish_donoho_rank(self) -> int:
        """The rank by the optimal hard threshold (:class:`GavishDonoho`)."""
        return GavishDonoho()(self._rule_input)

    @property
    def evbmf_rank(self) -> int:
        """The rank by variational Bayesian matrix factorization (:class:`EVBMF`)."""
        return EVBMF()(self._rule_input)

    @cached_property
    def power_law(self) -> PowerLaw | None:
        """The power law of the squared singular values (:func:`fit_power_law`)."""
        return fit_power_law(self.values.square())

    def plot(self, rank: Rank | None = None) -> Figure:
        """Plots the singular values beside the energy that each rank keeps, and marks a rank in both.

        Args:
            rank: the rank to mark, or a rule that chooses it.

        Raises:
            LowRankError: for what is not a rank.
            MissingExtraError: if matplotlib is not installed.
        """
        count = len(self.values)
        marked = None if rank is None else choose_rank(rank, self._rule_input, count)
        ranks, kept = range(1, count + 1), self.cumulative_energy.tolist()
        left, right = panels(2)
        style = "o-" if count <= 40 else "-"
        left.plot(ranks, self.values.tolist(), style, color=colour(0), markersize=4)
        left.set(xlabel="index", ylabel="singular value", title="Singular values")
        if self.spectral_norm > 0:
            logarithmic(left, "y")
        right.plot(ranks, kept, style, color=colour(0), markersize=4)
        right.set(xlabel="rank", ylabel="energy kept", ylim=(0, 1.04), title="Cumulative energy")
        right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        for axes in (left, right):
            whole_x(axes)
            if marked is not None:
                label = f"rank {marked}: {kept[marked - 1]:.2%} of the energy"
                axes.axvline(marked, color=colour(1), linestyle="--", label=label)
                legend(axes)
        return figure_of(left)

    @property
    def _unit(self) -> Tensor:
        """The values over the largest one."""
        scaled = scaled_to_unit(self.values)[0]
        return scaled / scaled[0] if float(scaled[0]) > 0 else scaled

    @property
    def _rule_input(self) -> Spectrum:
        return pair_spectrum(*self.shape, self.values, "spectrum")
