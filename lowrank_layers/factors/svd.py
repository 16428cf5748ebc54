"""The singular value decomposition as a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..checks import check_integer
from ..linalg import Matrix
from .base import relative_error_of_product


@dataclass(frozen=True)
class SVD:
    r"""A matrix as ``U diag(S) V^T``: its singular value decomposition, possibly truncated.

    Args:
        u: left singular vectors.
        s: singular values, largest first.
        vh: right singular vectors, as rows.

    Shape:
        ``u`` ``[m, r]``, ``s`` ``[r]``, ``vh`` ``[r, n]``, dense ``[m, n]``.

    Examples:
        >>> f = lr.svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> f.rank, f.numel(), round(f.relative_error(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), 4)
        (2, 14, 0.2673)
    """

    u: Tensor
    s: Tensor
    vh: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense matrix."""
        return self.u.shape[0], self.vh.shape[1]

    @property
    def rank(self) -> int:
        """Number of singular triplets kept."""
        return self.s.shape[0]

    def numel(self) -> int:
        """Number of values stored."""
        return self.u.numel() + self.s.numel() + self.vh.numel()

    def to_dense(self) -> Tensor:
        """Multiplies out ``U diag(S) V^T``."""
        return (self.u * self.s) @ self.vh

    def pair(self) -> tuple[Tensor, Tensor]:
        """The balanced pair ``(U sqrt(S), sqrt(S) V^T)`` of shapes ``[m, r]`` and ``[r, n]``."""
        root = self.s.sqrt()
        return self.u * root, root[:, None] * self.vh

    def truncate(self, rank: int) -> SVD:
        """Keeps the leading ``rank`` triplets: the best approximation of that rank (Eckart-Young)."""
        check_integer(rank, "truncate", "rank", 1)
        return SVD(self.u[:, :rank], self.s[:rank], self.vh[:rank])

    def relative_error(self, dense: Matrix) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm; for a sparse matrix accurate to about 1e-8."""
        return relative_error_of_product(self.u * self.s, self.vh, self, dense)
