"""Empirical variational Bayesian matrix factorization."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .rule import Spectrum


@dataclass(frozen=True)
class EVBMF:
    """The rank that empirical variational Bayesian matrix factorization finds; the noise level is estimated.

    With ``a = m / n <= 1``, ``tau = 2.5129 sqrt(a)`` and ``x = (1 + tau)(1 + a / tau)``, it keeps
    ``s > sqrt(n v x)``, where the noise variance ``v`` minimises the free energy
    (Nakajima, Sugiyama, Babacan and Tomioka, JMLR 2013, theorem 2 and corollary 3).
    On weights without structure the answer would be 0; a layer needs at least 1.

    Examples:
        >>> noise = 0.1 * torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        >>> noise[:3, :3] += 20 * torch.eye(3)
        >>> lr.EVBMF()(lr.Spectrum(torch.linalg.svdvals(noise), (60, 90), [150], 5400))
        3
    """

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        squares = spectrum.energies(self).cpu()
        rows, columns = sorted(spectrum.shape)
        alpha = rows / columns
        tau = 2.5129 * math.sqrt(alpha)
        threshold = (1 + tau) * (1 + alpha / tau)
        if float(squares.sum()) == 0:
            return 1
        variance = _noise_variance(squares, rows, columns, alpha, threshold)
        return max(1, int((squares > columns * variance * threshold).sum()))


def _noise_variance(squares: Tensor, rows: int, columns: int, alpha: float, threshold: float) -> float:
    """Minimises the free energy over the interval that theorem 2 gives, on a grid refined three times."""
    largest_rank = min(math.ceil(rows / (1 + alpha)) - 1, len(squares)) - 1
    tail = squares[min(largest_rank + 1, len(squares) - 1) :]
    highest = float(squares.sum()) / (rows * columns)
    lowest = max(float(tail[0]) / (columns * threshold), float(tail.mean()) / columns)
    lowest = min(max(lowest, highest * 1e-12), highest)
    for _ in range(4):
        grid = torch.logspace(math.log10(lowest), math.log10(highest), 200, dtype=torch.float64)
        best = int(_free_energy(squares, columns * grid, alpha, threshold).argmin())
        lowest, highest = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    return float(grid[best])


def _free_energy(squares: Tensor, noise: Tensor, alpha: float, threshold: float) -> Tensor:
    """Corollary 3 up to a constant, for every candidate of the noise energy ``n * v``."""
    x = (squares[None] / noise[:, None]).clamp_min(1e-300)
    excess = x.clamp_min(threshold) - (1 + alpha)
    tau = (excess + (excess.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
    gain = (tau + 1).log() + alpha * (tau / alpha + 1).log() - tau
    return (x - x.log() + gain * (x > threshold)).sum(1)
