"""One row per rank rule: in ``RULES`` if it reads singular values, in ``REFIT_RULES`` if it fits several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import lowrank_layers as lr

from .common import generator


@dataclass(frozen=True)
class RuleRow:
    """A rank rule that reads singular values.

    Args:
        rule: the rule.
        reference: its formula in plain numpy, from the singular values (descending, fp64) and the shape of the matrix.
        noiseless: whether it finds the exact rank of a matrix with a little noise.
    """

    rule: Callable[[lr.Spectrum], int]
    reference: Callable[[np.ndarray, tuple[int, int]], int]
    noiseless: bool = False

    @property
    def name(self) -> str:
        return str(self.rule)


def _energy(fraction: float) -> Callable[[np.ndarray, tuple[int, int]], int]:
    def reference(s: np.ndarray, shape: tuple[int, int]) -> int:
        kept = np.cumsum(s**2)
        return next(r + 1 for r, k in enumerate(kept) if k >= fraction * kept[-1])

    return reference


def _relative_error(bound: float) -> Callable[[np.ndarray, tuple[int, int]], int]:
    def reference(s: np.ndarray, shape: tuple[int, int]) -> int:
        total = np.linalg.norm(s)
        return next(r for r in range(1, len(s) + 1) if np.linalg.norm(s[r:]) <= bound * total)

    return reference


def _gavish_donoho(s: np.ndarray, shape: tuple[int, int]) -> int:
    b = min(shape) / max(shape)
    return max(1, int((s > (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * np.median(s)).sum()))


def _elbow(s: np.ndarray, shape: tuple[int, int]) -> int:
    """What stands before the value furthest below the chord: that one already belongs to the floor."""
    chord = np.linspace(s[0], s[-1], len(s))
    return max(1, int(np.argmax(chord - s)))


def _evbmf(s: np.ndarray, shape: tuple[int, int]) -> int:
    """Nakajima et al., JMLR 2013, with the free energy minimised on a fine grid."""
    rows, columns = sorted(shape)
    alpha = rows / columns
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    first = min(math.ceil(rows / (1 + alpha)) - 1, len(s)) - 1 + 1
    highest = (s**2).sum() / (rows * columns)
    lowest = max(s[first] ** 2 / (columns * x_bar), (s[first:] ** 2).mean() / columns)

    def free_energy(variance: float) -> float:
        x = s**2 / (columns * variance)
        above, below = x[x > x_bar], x[x <= x_bar]
        tau = 0.5 * (above - (1 + alpha) + np.sqrt((above - (1 + alpha)) ** 2 - 4 * alpha))
        return float(
            (below - np.log(below)).sum()
            + (above - tau).sum()
            + np.log((tau + 1) / above).sum()
            + alpha * np.log(tau / alpha + 1).sum()
        )

    variance = min(np.geomspace(lowest, highest, 4000), key=free_energy)
    return max(1, int((s > math.sqrt(columns * variance * x_bar)).sum()))


def _stable_rank(s: np.ndarray, shape: tuple[int, int]) -> int:
    return max(1, round((np.linalg.norm(s) / s[0]) ** 2))


def _effective_rank(s: np.ndarray, shape: tuple[int, int]) -> int:
    p = s[s > 0] / s.sum()
    return max(1, round(math.exp(-(p * np.log(p)).sum())))


def _residual_whiteness(s: np.ndarray, shape: tuple[int, int]) -> int:
    """One rank after the other, with the 99 % quantile of Tracy and Widom's first law."""
    for r in range(1, len(s)):
        p, q = shape[0] - r, shape[1] - r
        variance = (s[r:] ** 2).sum() / (p * q)
        both = math.sqrt(p) + math.sqrt(q)
        if s[r] ** 2 <= variance * (both**2 + 2.0234 * both * (p**-0.5 + q**-0.5) ** (1 / 3)):
            return r
    return max(1, len(s) - 1)


RULES = [
    RuleRow(lr.Energy(0.5), _energy(0.5)),
    RuleRow(lr.Energy(0.9), _energy(0.9)),
    RuleRow(lr.Energy(0.99), _energy(0.99)),
    RuleRow(lr.RelativeError(0.05), _relative_error(0.05)),
    RuleRow(lr.RelativeError(0.4), _relative_error(0.4)),
    RuleRow(lr.EVBMF(), _evbmf, noiseless=True),
    RuleRow(lr.GavishDonoho(), _gavish_donoho, noiseless=True),
    RuleRow(lr.ResidualWhiteness(), _residual_whiteness, noiseless=True),
    RuleRow(lr.Elbow(), _elbow, noiseless=True),
    RuleRow(lr.StableRank(), _stable_rank, noiseless=True),
    RuleRow(lr.EffectiveRank(), _effective_rank),
]


@dataclass(frozen=True)
class RefitRow:
    """A rank rule that looks at factorizations of several ranks.

    Args:
        rule: the rule.
        decompose: a decomposition that takes it.
        planted: makes a tensor of a known rank, with noise, from the rank and a seed.
        ranks: the ranks that it finds.
        refused: a decomposition whose factors it cannot read, if there is one.
    """

    rule: Callable[[lr.Spectrum], int]
    decompose: Callable[..., lr.SVD | lr.NMF | lr.CP]
    planted: Callable[[int, int], Tensor]
    ranks: tuple[int, ...]
    refused: Callable[..., lr.Factorization] | None = None

    @property
    def name(self) -> str:
        return f"{self.decompose.__name__}-{self.rule}"


def _noisy(tensor: Tensor, noise: float, g: torch.Generator) -> Tensor:
    """Adds white noise of that part of the tensor's norm."""
    dirt = torch.randn(tensor.shape, generator=g)
    return tensor + noise * dirt * tensor.norm() / dirt.norm()


def _matrix(noise: float) -> Callable[[int, int], Tensor]:
    def planted(rank: int, seed: int) -> Tensor:
        g = generator(seed)
        return _noisy(torch.randn(40, rank, generator=g) @ torch.randn(rank, 30, generator=g), noise, g)

    return planted


def _kernel(noise: float) -> Callable[[int, int], Tensor]:
    def planted(rank: int, seed: int) -> Tensor:
        g = generator(seed)
        factors = tuple(torch.randn(n, rank, generator=g) for n in (12, 10, 8))
        return _noisy(lr.CP(torch.ones(rank), factors).to_dense(), noise, g)

    return planted


def _clusters(noise: float) -> Callable[[int, int], Tensor]:
    """Columns that belong to one component each and have up to 0.3 of the others, and uniform noise."""

    def planted(rank: int, seed: int) -> Tensor:
        g = generator(seed)
        per_cluster = 24 // rank
        weights = torch.eye(rank).repeat(1, per_cluster) + 0.3 * torch.rand(rank, rank * per_cluster, generator=g)
        matrix = torch.rand(30, rank, generator=g) @ weights
        return matrix + noise * matrix.mean() * torch.rand(matrix.shape, generator=g)

    return planted


REFIT_RULES = [
    RefitRow(lr.CrossValidation(ranks=range(1, 7)), lr.svd, _matrix(0.3), (1, 2, 4)),
    RefitRow(lr.CrossValidation(ranks=range(1, 7)), lr.svd, _matrix(0.0), (1, 3)),
    RefitRow(lr.CrossValidation(folds=3, ranks=range(1, 5)), lr.cp, _kernel(0.1), (2, 3)),
    RefitRow(lr.CrossValidation(folds=3, ranks=range(1, 4)), lr.nmf, _clusters(0.1), (2,)),
    RefitRow(lr.FactorMatch(ranks=range(1, 6)), lr.cp, _kernel(0.2), (2, 3), lr.svd),
    RefitRow(lr.FactorMatch(ranks=range(1, 5), restarts=5), lr.nmf, _clusters(0.1), (2, 3), lr.svd),
    RefitRow(lr.CORCONDIA(ranks=range(1, 6)), lr.cp, _kernel(0.01), (3, 4), lr.svd),
    RefitRow(lr.ConsensusStability(ranks=range(2, 5), restarts=5), lr.nmf, _clusters(0.1), (2, 3), lr.cp),
    RefitRow(
        lr.ConsensusStability(ranks=range(2, 5), restarts=10, measure="cophenetic"), lr.nmf, _clusters(0.3), (2, 3)
    ),
]


def spectrum(matrix: Tensor) -> lr.Spectrum:
    """What a layer shows to a rule for this matrix."""
    return spectrum_of(torch.linalg.svdvals(matrix.double()), tuple(matrix.shape))


def spectrum_of(values: Tensor | None, shape: tuple[int, int]) -> lr.Spectrum:
    rows, columns = shape
    step = rows + columns
    return lr.Spectrum(values, shape, range(step, step * min(shape) + 1, step), rows * columns, "test")
