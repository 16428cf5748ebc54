"""A grouped convolution as one factorization per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import relative_error
from .cp import CP
from .svd import SVD
from .tucker import Tucker


@dataclass(frozen=True)
class Blocks:
    """The weight of a grouped convolution: one factorization per group, stacked along the first mode.

    Args:
        parts: one factorization per group, all of the same shape.

    Examples:
        >>> f = lr.LowRankConv1d(8, 6, 3, groups=2, rank=2).factors()
        >>> f.shape, f.rank, f.parts[0].shape
        ((6, 12), 2, (3, 12))
    """

    parts: tuple[SVD | Tucker | CP, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        first, *rest = self.parts[0].shape
        return first * len(self.parts), *rest

    @property
    def rank(self) -> int | tuple[int, ...]:
        """Rank of each group, the same for all."""
        return self.parts[0].rank

    def numel(self) -> int:
        """Number of values stored."""
        return sum(part.numel() for part in self.parts)

    def to_dense(self) -> Tensor:
        """Multiplies out every group and stacks the results along the first mode."""
        return torch.cat([part.to_dense() for part in self.parts])

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return relative_error(self, dense)
