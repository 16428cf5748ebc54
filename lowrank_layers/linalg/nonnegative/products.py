"""Products of a non-negative matrix with factors, dense or without its zeros.

Factors are ``W^T [r, m]`` and ``H [r, n]``: components are rows, so that each is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..sparse import SparseMatrix, with_values
from .zeros import tiny


class DenseProducts:
    """A dense matrix, and the products with it that the updates need."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = self.entries = matrix
        self.nnz = matrix.numel()
        # quotients are stored for one chunk of rows at a time
        step = max(1, (2**20 if matrix.device.type == "cpu" else 2**26) // matrix.shape[1])
        self.chunks = [slice(start, start + step) for start in range(0, len(matrix), step)]

    def left(self, w: Tensor) -> Tensor:
        """``W^T X``."""
        return w @ self.matrix

    def right(self, h: Tensor) -> Tensor:
        """``H X^T``."""
        return h @ self.matrix.mT

    def quotient_left(self, w: Tensor, h: Tensor) -> Tensor:
        """``W^T (X / W H)``."""
        product = torch.zeros_like(h)
        for rows, _, quotient in self._quotients(w, h):
            product.addmm_(w[:, rows], quotient)
        return product

    def quotient_right(self, w: Tensor, h: Tensor) -> tuple[Tensor, float]:
        """``H (X / W H)^T``, and ``sum X log(X / W H)``."""
        products, logs = [], []
        for _, part, quotient in self._quotients(w, h):
            products.append(h @ quotient.mT)
            logs.append(quotient.clamp_min_(tiny(quotient)).log_().mul_(part).sum().double())
        return torch.cat(products, dim=1), float(torch.stack(logs).sum())

    def _quotients(self, w: Tensor, h: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields rows, that part of the matrix, and its quotient by ``W H``."""
        buffer = torch.empty_like(self.matrix[self.chunks[0]])
        for rows in self.chunks:
            part = self.matrix[rows]
            quotient = torch.mm(w[:, rows].mT, h, out=buffer[: len(part)])
            yield rows, part, torch.div(part, quotient.clamp_min_(tiny(quotient)), out=quotient)


class SparseProducts:
    """A sparse matrix, and the products with it that the updates need; zeros cost nothing."""

    def __init__(self, matrix: SparseMatrix) -> None:
        self.matrix = matrix
        self.entries = matrix.values
        self.nnz = matrix.values.numel()

    def left(self, w: Tensor) -> Tensor:
        """``W^T X``."""
        return _times(self.matrix.columns, w)

    def right(self, h: Tensor) -> Tensor:
        """``H X^T``."""
        return _times(self.matrix.rows, h)

    def quotient_left(self, w: Tensor, h: Tensor) -> Tensor:
        """``W^T (X / W H)``."""
        return _times(_quotients(self.matrix.columns, h, w), w)

    def quotient_right(self, w: Tensor, h: Tensor) -> tuple[Tensor, float]:
        """``H (X / W H)^T``, and ``sum X log(X / W H)``."""
        quotients = _quotients(self.matrix.rows, w, h)
        values = quotients.values()
        log = values.clamp_min(tiny(values)).log_().mul_(self.entries).sum(dtype=torch.float64)
        return _times(quotients, h), float(log)


Products = DenseProducts | SparseProducts


def products_of(matrix: Tensor | SparseMatrix) -> Products:
    """Returns the products that suit a matrix: without its zeros if it is sparse, or if nine tenths of it are zero."""
    if isinstance(matrix, SparseMatrix):
        return SparseProducts(matrix)
    few = matrix.numel() > 2**16 and int(torch.count_nonzero(matrix)) < 0.1 * matrix.numel()
    return SparseProducts(SparseMatrix.of(matrix)) if few and _has_kernels(matrix) else DenseProducts(matrix)


def _times(sparse: Tensor, factor: Tensor) -> Tensor:
    """Computes ``factor @ sparse^T`` from row-major operands, for which the sparse product is fastest."""
    product: Tensor = sparse @ factor.mT.contiguous()
    return product.mT.contiguous()


def _quotients(sparse: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Computes ``sparse / own^T other`` where ``sparse`` has entries."""
    if _has_kernels(sparse):
        model = torch.sparse.sampled_addmm(sparse, own.mT.contiguous(), other.mT.contiguous().mT, beta=0.0).values()
    else:
        model = _sampled(sparse, own, other)
    return with_values(sparse, torch.div(sparse.values(), model.clamp_min_(tiny(model)), out=model))


def _sampled(sparse: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Computes ``own^T other`` where ``sparse`` has entries, without a sparse kernel."""
    counts = sparse.crow_indices().diff()
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    step = max(1, 2**22 // len(own))
    pairs = zip(rows.split(step), sparse.col_indices().split(step), strict=True)
    return torch.cat([(own[:, row] * other[:, column]).sum(0) for row, column in pairs])


def _has_kernels(tensor: Tensor) -> bool:
    """Returns whether torch has fast sparse kernels for the device of a tensor."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and torch.backends.mkl.is_available())
