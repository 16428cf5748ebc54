"""The non-negative matrix factorization as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..checks import check_integer
from ..errors import LowRankError
from ..linalg import Matrix, check_matrix, scaled_to_unit, working_dtype
from ..linalg.nonnegative import Loss, Stopping, check_choice, check_nonnegative, products_of, weights_of
from .base import relative_error_of_product


@dataclass(frozen=True)
class NMF:
    """A non-negative matrix as a product ``W H`` of non-negative factors.

    Args:
        w: weights of the components in each row of the matrix.
        h: the components, as rows.

    Shape:
        ``w`` ``[m, r]``, ``h`` ``[r, n]``, dense ``[m, n]``.

    Examples:
        >>> f = lr.nmf(torch.ones(4, 3), rank=1)
        >>> f.rank, f.numel(), f.relative_error(torch.ones(4, 3)) < 1e-6
        (1, 7, True)
    """

    w: Tensor
    h: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense matrix."""
        return self.w.shape[0], self.h.shape[1]

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.h.shape[0]

    def numel(self) -> int:
        """Number of values stored."""
        return self.w.numel() + self.h.numel()

    def to_dense(self) -> Tensor:
        """Multiplies out ``W H``."""
        return self.w @ self.h

    def truncate(self, rank: int) -> NMF:
        """Keeps the ``rank`` components of largest ``||w_k|| ||h_k||``, in their order.

        Unlike SVD's this is not the best approximation of that rank.
        """
        check_integer(rank, "truncate", "rank", 1)
        sizes = torch.linalg.vector_norm(self.w.double(), dim=0) * torch.linalg.vector_norm(self.h.double(), dim=1)
        kept = sizes.argsort(descending=True, stable=True)[:rank].sort().values
        return NMF(self.w[:, kept], self.h[kept])

    def transform(
        self, matrix: Matrix, *, loss: Loss = "frobenius", sweeps: int = 1000, tolerance: float = 1e-6
    ) -> Tensor:
        """The non-negative weights of these components in new rows: the ``W`` that fits them best with ``H`` fixed.

        Solves one convex problem per row, by HALS or, for ``"kl"``, by multiplicative updates.

        Args:
            matrix: the new rows, non-negative, dense or sparse, as in :func:`nmf`.
            loss: loss of the factorization, ``"frobenius"`` or ``"kl"``.
            sweeps: largest number of sweeps.
            tolerance: stops when no weight moves by more than this fraction of the largest one.

        Shape:
            ``[any, n]`` to ``[any, r]``.

        Raises:
            LowRankError: for another number of columns, and for input that :func:`nmf` refuses.

        Examples:
            >>> w, h = torch.rand(30, 3), torch.rand(3, 20)
            >>> f = lr.nmf(w @ h, rank=3, tolerance=0)
            >>> new = torch.rand(5, 3) @ h
            >>> weights = f.transform(new)
            >>> weights.shape, bool((weights @ f.h - new).norm() < 0.05 * new.norm())
            (torch.Size([5, 3]), True)
        """
        found = check_matrix(matrix, "NMF.transform")
        if found.shape[1] != self.h.shape[1]:
            raise LowRankError(
                f"NMF.transform: got shape {tuple(found.shape)}, expected {self.h.shape[1]} columns, as the factorized"
                " matrix has."
            )
        stopping = Stopping(sweeps, tolerance)
        stopping.check("NMF.transform")
        check_choice(loss, get_args(Loss), "NMF.transform", "loss")
        wide = found.to(working_dtype(found))
        check_nonnegative(wide, "NMF.transform")
        work, scale = scaled_to_unit(wide)
        h, size = scaled_to_unit(self.h.detach().to(work.device, work.dtype))
        weights = weights_of(products_of(work), h, loss, stopping)
        return (weights.mT * (scale / size)).to(found.dtype).contiguous()

    def relative_error(self, dense: Matrix) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm; for a sparse matrix accurate to about 1e-8."""
        return relative_error_of_product(self.w, self.h, self, dense)
