"""Stability of factors over restarts: the factor match score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integer
from ..errors import LowRankError
from ..factors import CP, NMF
from ..linalg import is_dense
from .refit import Refit, check_finite, check_ranks
from .rule import Spectrum, WithoutValues


@dataclass(frozen=True)
class FactorMatch(WithoutValues):
    """The largest rank at which random starts of CP or NMF find the same components.

    At every rank the start of least error is compared with the others by :func:`factor_match_score`; the rank is stable
    if the median is at least ``least``. The median allows for starts that end in local minima. At too large a rank the
    components that fit noise, or that split a true one, differ from start to start.

    Args:
        ranks: the ranks to try. The largest rank of use is left out, since it is exact for any tensor.
        restarts: number of random starts per rank, at least 2.
        least: the smallest median score that counts as stable.

    Examples:
        >>> a, b, c = torch.randn(9, 3), torch.randn(8, 3), torch.randn(7, 3)
        >>> tensor = torch.einsum("ir,jr,kr->ijk", a, b, c)
        >>> lr.cp(tensor + 0.1 * torch.randn(9, 8, 7), lr.FactorMatch(ranks=range(1, 6))).rank
        3
    """

    ranks: Sequence[int] = range(1, 11)
    restarts: int = 10
    least: float = 0.9

    def __post_init__(self) -> None:
        check_ranks(self.ranks, "FactorMatch")
        check_integer(self.restarts, "FactorMatch", "restarts", 2)
        check_finite(self.least, "FactorMatch", "least")

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        refit = spectrum.require_refit(self)
        ranks = spectrum.ranks_below_full(self.ranks)
        return max((rank for rank in ranks if self._score(rank, refit, spectrum.owner) >= self.least), default=1)

    def _score(self, rank: int, refit: Refit, owner: str) -> float:
        fits: list[CP | NMF] = []
        for seed in range(self.restarts):
            found = refit.fit(refit.tensor, rank, seed)
            if not isinstance(found, CP | NMF):
                raise LowRankError(f"{owner}: got {self}, which compares components; give it to cp or nmf.")
            fits.append(found)
        errors = [_error(fit, refit) for fit in fits]
        best = fits.pop(errors.index(min(errors)))
        return statistics.median(factor_match_score(best, fit) for fit in fits)


def _error(fit: CP | NMF, refit: Refit) -> float:
    if isinstance(fit, NMF):
        return fit.relative_error(refit.tensor)
    assert is_dense(refit.tensor)
    return fit.relative_error(refit.tensor)


def factor_match_score(first: CP | NMF, second: CP | NMF) -> float:
    r"""How well the components of two factorizations match: 1 if they are equal up to their order.

    Components are paired greedily, best first. The score of a pair is
    :math:`(1 - |w - w'| / \max(w, w')) \prod_k |\cos(a_k, a'_k)|` with the norms ``w`` and the columns ``a_k`` of both;
    the result is its mean (Tomasi and Bro, "A Comparison of Algorithms for Fitting the PARAFAC Model", 2006).

    Args:
        first: a factorization.
        second: another one, of the same shape and rank.

    Raises:
        LowRankError: for different shapes or ranks.

    Examples:
        >>> f = lr.cp(torch.randn(6, 5, 4), rank=2)
        >>> mirrored = lr.CP(f.weights.flip(0), tuple(factor.flip(1) for factor in f.factors))
        >>> round(lr.factor_match_score(f, mirrored), 4)
        1.0
    """
    if (first.shape, first.rank) != (second.shape, second.rank):
        raise LowRankError(
            f"factor_match_score: got shapes {first.shape} and {second.shape} at ranks {first.rank} and {second.rank},"
            " expected equal ones."
        )
    (sizes, columns), (other_sizes, other_columns) = _components(first), _components(second)
    scores = math.prod((a.mT @ b for a, b in zip(columns, other_columns, strict=True))).abs()  # type: ignore[union-attr]
    larger = torch.maximum(sizes[:, None], other_sizes).clamp_min(1e-300)
    scores = scores * (1 - (sizes[:, None] - other_sizes).abs() / larger)
    total = 0.0
    for _ in range(first.rank):
        row, column = divmod(int(scores.argmax()), first.rank)
        total += float(scores[row, column])
        scores[row], scores[:, column] = -1, -1
    return total / first.rank


def _components(fit: CP | NMF) -> tuple[Tensor, list[Tensor]]:
    """Norms of the components, and their columns of unit length per mode, in fp64."""
    factors = [factor.double() for factor in ((fit.w, fit.h.mT) if isinstance(fit, NMF) else fit.factors)]
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    columns = [factor / norm.clamp_min(1e-300) for factor, norm in zip(factors, norms, strict=True)]
    sizes = torch.stack(norms).prod(0)
    return sizes if isinstance(fit, NMF) else sizes * fit.weights.double(), columns
