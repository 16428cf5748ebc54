"""Stability of non-negative factorizations over restarts: the consensus of their clusterings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_integer
from ..errors import LowRankError
from ..factors import NMF
from ..linalg.nonnegative import check_choice
from .refit import Refit, check_finite, check_ranks
from .rule import Spectrum, WithoutValues

LEAST = {"dispersion": 0.97, "cophenetic": 0.9995}
"""The smallest values that count as stable. Above the planted rank the cophenetic correlation falls by little."""


@dataclass(frozen=True)
class ConsensusStability(WithoutValues):
    """The largest rank of a non-negative factorization that clusters the columns alike from every random start.

    Each of several random starts puts every column into the cluster of its largest weight; see
    :func:`consensus_matrix`. A rank is stable if the dispersion or the cophenetic correlation of the consensus is
    at least ``least``, and if in most starts every component has a column. (Brunet, Tamayo, Golub and Mesirov,
    "Metagenes and Molecular Pattern Discovery Using Matrix Factorization", 2004; Kim and Park, 2007.)

    It suits columns that belong to one component more than to the others. Where all components overlap everywhere,
    non-negative factors are not unique, and no rank above 1 is stable.

    Args:
        ranks: the ranks to try. Full rank is left out, since it is exact for any matrix.
        restarts: number of random starts per rank, at least 2.
        measure: ``"dispersion"`` or ``"cophenetic"``.
        least: the smallest value that counts as stable; by default 0.97 for the dispersion, 0.9995 for the cophenetic
            correlation.

    Examples:
        >>> w, h = torch.rand(40, 3), torch.eye(3).repeat(1, 10) + 0.2 * torch.rand(3, 30)
        >>> matrix = w @ h + 0.05 * torch.rand(40, 30)
        >>> lr.nmf(matrix, lr.ConsensusStability(ranks=range(2, 6), restarts=10)).rank
        3
    """

    ranks: Sequence[int] = range(2, 11)
    restarts: int = 20
    measure: Literal["dispersion", "cophenetic"] = "dispersion"
    least: float | None = None

    def __post_init__(self) -> None:
        check_ranks(self.ranks, "ConsensusStability")
        check_integer(self.restarts, "ConsensusStability", "restarts", 2)
        check_choice(self.measure, list(LEAST), "ConsensusStability", "measure")
        if self.least is not None:
            check_finite(self.least, "ConsensusStability", "least")

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        refit = spectrum.require_refit(self)
        ranks = spectrum.ranks_below_full(self.ranks)
        return max((rank for rank in ranks if self._is_stable(rank, refit, spectrum.owner)), default=1)

    def _is_stable(self, rank: int, refit: Refit, owner: str) -> bool:
        fits = [refit.fit(refit.tensor, rank, seed) for seed in range(self.restarts)]
        if not all(isinstance(each, NMF) for each in fits):
            raise LowRankError(f"{owner}: got {self}, which needs non-negative factors; give it to nmf.")
        clusters = [each.h.argmax(0) for each in fits if isinstance(each, NMF)]
        full = sum(len(each.unique()) == rank for each in clusters)
        if 2 * full <= len(clusters):
            return False
        consensus = _consensus(clusters)
        value = dispersion(consensus) if self.measure == "dispersion" else cophenetic_correlation(consensus)
        return value >= (LEAST[self.measure] if self.least is None else self.least)


def consensus_matrix(fits: Sequence[NMF]) -> Tensor:
    """How often two columns belong to the same component, over several factorizations of a matrix.

    A column belongs to the component of its largest weight (Brunet et al., 2004).

    Args:
        fits: factorizations of the same matrix from different starts.

    Shape:
        ``[n, n]``, with ones on the diagonal.

    Examples:
        >>> matrix = torch.block_diag(torch.ones(4, 3), torch.ones(4, 3))
        >>> fits = [lr.nmf(matrix, 2, init="random", seed=seed) for seed in range(3)]
        >>> lr.consensus_matrix(fits)[0].tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    return _consensus([fit.h.argmax(0) for fit in fits])


def _consensus(clusters: Sequence[Tensor]) -> Tensor:
    return torch.stack([(each[:, None] == each).double() for each in clusters]).mean(0)


def dispersion(consensus: Tensor) -> float:
    """The dispersion ``1/n^2 sum 4 (C_ij - 1/2)^2`` of a consensus matrix: 1 if all starts agree (Kim and Park, 2007).

    Args:
        consensus: what :func:`consensus_matrix` returns.

    Shape:
        ``[n, n]``.

    Examples:
        >>> lr.dispersion(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        0.5
    """
    return float((4 * (consensus.double() - 0.5).square()).mean())


def cophenetic_correlation(consensus: Tensor) -> float:
    """The correlation of the distances ``1 - C_ij`` with those of their dendrogram by average linkage.

    It is 1 if all starts agree (Brunet et al., 2004).

    Args:
        consensus: what :func:`consensus_matrix` returns.

    Shape:
        ``[n, n]``.

    Examples:
        >>> agreed = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> round(lr.cophenetic_correlation(agreed), 6)
        1.0
    """
    distances = 1 - consensus.double()
    above = torch.ones_like(distances, dtype=torch.bool).triu(1)
    both = torch.stack([distances[above], _cophenetic_distances(distances)[above]])
    centred = both - both.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1)
    # equal distances, as where all columns are one cluster, are those of their dendrogram
    return float(centred[0] @ centred[1] / norms.prod()) if bool((norms > 1e-12).all()) else 1.0


def _cophenetic_distances(distances: Tensor) -> Tensor:
    """The height at which two points are joined, where the clusters of least mean distance are joined first."""
    count = len(distances)
    between = distances.clone().fill_diagonal_(torch.inf)
    members = torch.eye(count, dtype=torch.bool, device=distances.device)
    sizes = distances.new_ones(count)
    heights = torch.zeros_like(distances)
    for _ in range(count - 1):
        a, b = divmod(int(between.argmin()), count)
        pairs = members[a][:, None] & members[b]
        heights[pairs | pairs.mT] = between[a, b]
        joined = (sizes[a] * between[a] + sizes[b] * between[b]) / (sizes[a] + sizes[b])
        between[a], between[:, a] = joined, joined
        between[b], between[:, b] = torch.inf, torch.inf
        between[a, a] = torch.inf
        members[a] |= members[b]
        sizes[a] += sizes[b]
    return heights
