"""Sparse matrices: products with dense ones, and nothing that would need the zeros."""

from __future__ import annotations

import warnings
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
        """In coordinates."""


Matrix = Tensor | ScipySparse


class SparseMatrix:
    """A matrix in compressed rows, and its transpose in compressed rows: products with both are fast.

    Args:
        rows: the matrix, in ``torch.sparse_csr``.
        columns: its transpose, likewise.
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns

    @classmethod
    def of(cls, matrix: Tensor) -> SparseMatrix:
        """From a tensor of any layout; entries given twice are added up."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compressed rows announce themselves as beta
            coordinates = matrix.to_sparse_coo().coalesce()
            return cls(coordinates.to_sparse_csr(), coordinates.mT.coalesce().to_sparse_csr())

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return self.rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Of the entries."""
        return self.rows.device

    @property
    def mT(self) -> SparseMatrix:
        """The transpose."""
        return SparseMatrix(self.columns, self.rows)

    @property
    def values(self) -> Tensor:
        """The entries that are stored, row by row."""
        return self.rows.values()

    def __matmul__(self, dense: Tensor) -> Tensor:
        product: Tensor = self.rows @ dense.contiguous()
        return product

    def __truediv__(self, scale: float) -> SparseMatrix:
        return SparseMatrix(
            with_values(self.rows, self.rows.values() / scale), with_values(self.columns, self.columns.values() / scale)
        )

    def to(self, dtype: torch.dtype) -> SparseMatrix:
        """With entries of another dtype."""
        pair = (with_values(part, part.values().to(dtype)) for part in (self.rows, self.columns))
        return self if dtype == self.dtype else SparseMatrix(*pair)

    def double(self) -> SparseMatrix:
        """In fp64."""
        return self.to(torch.float64)

    def to_dense(self) -> Tensor:
        """With its zeros."""
        return self.rows.to_dense()

    def gram(self) -> Tensor:
        """``A A^T``, a strip of columns at a time."""
        count = self.shape[0]
        strips = []
        for start in range(0, count, _STRIP):
            width = min(_STRIP, count - start)
            unit = torch.zeros(count, width, dtype=self.dtype, device=self.device)
            unit[start : start + width].fill_diagonal_(1)
            strips.append(self @ (self.mT @ unit))
        return torch.cat(strips, 1)


_STRIP = 256
"""Columns of a Gram matrix that are formed at once."""


def is_dense(matrix: Matrix) -> TypeGuard[Tensor]:
    """Whether it is a tensor of none of torch's sparse layouts."""
    return isinstance(matrix, Tensor) and matrix.layout not in _SPARSE


def check_matrix(matrix: Matrix, who: str) -> Tensor | SparseMatrix:
    """A dense matrix as :func:`check_tensor` returns it; one of torch's sparse layouts or of scipy.sparse as it is.

    Args:
        matrix: what to look at.
        who: the caller, which opens the message.

    Raises:
        LowRankError: if it is no floating-point matrix with finite entries, is empty or lies on the meta device.
    """
    if is_dense(matrix):
        return check_tensor(matrix, who, ndim=2)
    if not isinstance(matrix, Tensor):
        if not (type(matrix).__module__.startswith("scipy.sparse") and hasattr(matrix, "tocoo")):
            raise LowRankError(
                f"{who}: got {type(matrix).__name__}, expected a torch.Tensor or a matrix of scipy.sparse."
            )
        matrix = _from_scipy(matrix, who)
    # the checks of a dense tensor, on what a sparse one has
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.is_meta or not matrix.is_floating_point():
        return check_tensor(torch.empty(matrix.shape, dtype=matrix.dtype, device="meta"), who, ndim=2)
    found = SparseMatrix.of(matrix.detach())
    if found.values.numel():
        check_tensor(found.values[None], who)
    return found


def _from_scipy(matrix: ScipySparse, who: str) -> Tensor:
    parts = matrix.tocoo()
    if parts.data.dtype.kind != "f":
        raise LowRankError(
            f"{who}: got a sparse matrix of {parts.data.dtype}, expected floating-point numbers; convert it with"
            " .astype('float32')."
        )
    indices = torch.stack([torch.tensor(side, dtype=torch.int64) for side in (parts.row, parts.col)])
    return torch.sparse_coo_tensor(indices, torch.tensor(parts.data), tuple(parts.shape), check_invariants=True)


def with_values(sparse: Tensor, values: Tensor) -> Tensor:
    """A matrix in compressed rows with other entries in the same places."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            sparse.crow_indices(), sparse.col_indices(), values, sparse.shape, check_invariants=False
        )
