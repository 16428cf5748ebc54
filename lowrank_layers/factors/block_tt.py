"""A matrix as a block tensor train, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..checks import check_integer
from ..errors import LowRankError
from ..linalg import rounded_train, train_product
from .base import relative_error


@dataclass(frozen=True)
class BlockTT:
    r"""A matrix as a block tensor train (Oseledets, 2011; Novikov et al., 2015).

    Row and column indices are written in mixed radix, :math:`i_1 \dots i_K` and :math:`j_1 \dots j_K`, the first
    digits slowest. An entry is the product of small matrices :math:`G_1[i_1, j_1] \cdots G_K[i_K, j_K]`, of which the
    first has one row and the last one column.

    Args:
        cores: one per digit.
        rows: number of rows of the matrix; rows that the digits count beyond it are cropped.

    Shape:
        ``cores[k]`` ``[r_{k-1}, n_k, d_k, r_k]`` with ``r_0 = r_K = 1``; dense ``[rows, d_1 * ... * d_K]``.

    Examples:
        >>> f = lr.TensorizedEmbedding(10, 6, rank=2).factors()
        >>> f.shape, f.rank, [tuple(core.shape) for core in f.cores]
        ((10, 6), (2, 2), [(1, 3, 1, 2), (2, 2, 2, 2), (2, 2, 3, 1)])
    """

    cores: tuple[Tensor, ...]
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense matrix."""
        return self.rows, math.prod(core.shape[2] for core in self.cores)

    @property
    def rank(self) -> tuple[int, ...]:
        """The inner bond ranks."""
        return tuple(core.shape[3] for core in self.cores[:-1])

    def numel(self) -> int:
        """Number of values stored."""
        return sum(core.numel() for core in self.cores)

    def to_dense(self) -> Tensor:
        """The matrix, without the rows that only fill up the digits."""
        return train_product(self.cores)[: self.rows]

    def truncate(self, rank: tuple[int, ...]) -> BlockTT:
        """Rounds the train to smaller bond ranks in fp64 (TT-rounding): within ``sqrt(K - 1)`` of the best such train.

        Args:
            rank: one entry per bond; bonds that are smaller already stay.
        """
        if len(rank) != len(self.cores) - 1:
            raise LowRankError(
                f"BlockTT.truncate: got {len(rank)} ranks, expected {len(self.cores) - 1}, one per bond."
            )
        for r in rank:
            check_integer(r, "truncate", "rank", 1)
        small = rounded_train([core.detach().double().flatten(1, 2) for core in self.cores], rank)
        pairs = zip(small, self.cores, strict=True)
        return BlockTT(tuple(new.unflatten(1, old.shape[1:3]).to(old.dtype) for new, old in pairs), self.rows)

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return relative_error(self, dense)
