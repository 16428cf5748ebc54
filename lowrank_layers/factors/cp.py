"""The canonical polyadic decomposition as a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..checks import check_integer
from .base import relative_error


@dataclass(frozen=True)
class CP:
    """A tensor as a sum of ``rank`` outer products of unit vectors: its canonical polyadic decomposition.

    Args:
        weights: the norm of each component, largest first.
        factors: one matrix per mode, columns of unit length.

    Shape:
        ``weights`` ``[r]``, ``factors[k]`` ``[n_k, r]``, dense ``[n_0, n_1, ...]``.

    Examples:
        >>> f = lr.cp(torch.ones(4, 3, 2), rank=1)
        >>> f.rank, f.numel(), f.relative_error(torch.ones(4, 3, 2)) < 1e-6
        (1, 10, True)
    """

    weights: Tensor
    factors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return tuple(factor.shape[0] for factor in self.factors)

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.weights.shape[0]

    def numel(self) -> int:
        """Number of values stored."""
        return self.weights.numel() + sum(factor.numel() for factor in self.factors)

    def balanced(self) -> tuple[Tensor, ...]:
        """The factors with the weights spread evenly over them."""
        root = self.weights ** (1 / len(self.factors))
        return tuple(factor * root for factor in self.factors)

    def to_dense(self) -> Tensor:
        """Sums the components."""
        left = self.factors[0] * self.weights
        for factor in self.factors[1:-1]:
            left = (left[..., None, :] * factor).reshape(-1, self.rank)
        return (left @ self.factors[-1].mT).reshape(self.shape)

    def truncate(self, rank: int) -> CP:
        """Keeps the ``rank`` largest components. Unlike SVD's this is not the best approximation of that rank."""
        check_integer(rank, "truncate", "rank", 1)
        return CP(self.weights[:rank], tuple(factor[:, :rank] for factor in self.factors))

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return relative_error(self, dense)
