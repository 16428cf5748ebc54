"""Sparse matrices and their products with dense ones; zeros are never formed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from ..errors import LowRankError
from .check import check_tensor

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class ScipySparse(Protocol):
    """A matrix or array of scipy.sparse."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    def tocoo(self) -> Any:
        """Converts to coordinate format."""


Matrix = Tensor | ScipySparse


class SparseMatrix:
    """A matrix and its transpose, both in compressed rows, so that products with either are fast.

    Args:
        rows: the matrix in ``torch.sparse_csr`` layout.
        columns: its transpose in ``torch.sparse_csr`` layout.
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns

    @classmethod
    def of(cls, matrix: Tensor) -> SparseMatrix:
        """Converts a tensor of any layout; duplicate entries are summed."""
        with _unwarned():
            coordinates = matrix.to_sparse_coo().coalesce()
            return cls(coordinates.to_sparse_csr(), coordinates.mT.coalesce().to_sparse_csr())

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return self.rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.rows.device

    @property
    def mT(self) -> SparseMatrix:
        """The transpose."""
        return SparseMatrix(self.columns, self.rows)

    @property
    def values(self) -> Tensor:
        """The stored entries, in order of rows."""
        return self.rows.values()

    def __matmul__(self, dense: Tensor) -> Tensor:
        product: Tensor = self.rows @ dense.contiguous()
        return product

    def __truediv__(self, scale: float) -> SparseMatrix:
        return SparseMatrix(
            with_values(self.rows, self.rows.values() / scale), with_values(self.columns, self.columns.values() / scale)
        )

    def to(self, dtype: torch.dtype) -> SparseMatrix:
        """Converts the entries to another dtype."""
        pair = (with_values(part, part.values().to(dtype)) for part in (self.rows, self.columns))
        return self if dtype == self.dtype else SparseMatrix(*pair)

    def double(self) -> SparseMatrix:
        """Converts the entries to fp64."""
        return self.to(torch.float64)

    def to_dense(self) -> Tensor:
        """Converts to a dense tensor."""
        return self.rows.to_dense()

    def gram(self) -> Tensor:
        """Computes ``A A^T``, a strip of columns at a time."""
        count = self.shape[0]
        strips = []
        for start in range(0, count, _STRIP):
            width = min(_STRIP, count - start)
            unit = torch.zeros(count, width, dtype=self.dtype, device=self.device)
            unit[start : start + width].fill_diagonal_(1)
            strips.append(self @ (self.mT @ unit))
        return torch.cat(strips, 1)


_STRIP = 256
"""Number of columns of a Gram matrix that are formed at once."""


def is_dense(matrix: Matrix) -> TypeGuard[Tensor]:
    """Returns whether a matrix is a tensor in dense layout."""
    return isinstance(matrix, Tensor) and matrix.layout not in _SPARSE


def check_matrix(matrix: Matrix, who: str) -> Tensor | SparseMatrix:
    """Returns a matrix detached, sparse ones as a :class:`SparseMatrix`, or raises if it cannot be factorized.

    Args:
        matrix: a dense tensor, a tensor in one of torch's sparse layouts, or a matrix of scipy.sparse.
        who: name of the calling function, for the message.

    Raises:
        LowRankError: if it is not a floating-point matrix with finite entries, is empty or is on the meta device.
    """
    if is_dense(matrix):
        return check_tensor(matrix, who, ndim=2)
    if not isinstance(matrix, Tensor):
        if not (type(matrix).__module__.startswith("scipy.sparse") and hasattr(matrix, "tocoo")):
            raise LowRankError(
                f"{who}: got {type(matrix).__name__}, expected a torch.Tensor or a matrix of scipy.sparse."
            )
        matrix = _from_scipy(matrix, who)
    # the checks of a dense tensor of that shape and dtype
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.is_meta or not matrix.is_floating_point():
        return check_tensor(torch.empty(matrix.shape, dtype=matrix.dtype, device="meta"), who, ndim=2)
    found = SparseMatrix.of(matrix.detach())
    if found.values.numel():
        check_tensor(found.values[None], who)
    return found


def _from_scipy(matrix: ScipySparse, who: str) -> Tensor:
    """Converts a matrix of scipy.sparse to torch's coordinate format."""
    parts = matrix.tocoo()
    if parts.data.dtype.kind != "f":
        raise LowRankError(
            f"{who}: got a sparse matrix of {parts.data.dtype}, expected floating-point numbers; convert it with"
            " .astype('float32')."
        )
    indices = torch.stack([torch.tensor(side, dtype=torch.int64) for side in (parts.row, parts.col)])
    return torch.sparse_coo_tensor(indices, torch.tensor(parts.data), tuple(parts.shape), check_invariants=True)


def with_values(sparse: Tensor, values: Tensor) -> Tensor:
    """Returns a matrix in compressed rows with other entries in the same places."""
    with _unwarned():
        return torch.sparse_csr_tensor(
            sparse.crow_indices(), sparse.col_indices(), values, sparse.shape, check_invariants=False
        )


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Silences torch's notices that the layout is in beta and that it does not check invariants by default."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning)
        yield
