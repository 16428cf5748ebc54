"""Factorizations as values: what a tensor became, how big it is, and how to get it back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from .errors import LowRankError
from .linalg import (
    Matrix,
    SparseMatrix,
    check_matrix,
    is_dense,
    mode_product,
    rounded_train,
    scaled_to_unit,
    train_product,
    unit_scale,
    working_dtype,
)
from .linalg.nonnegative import Loss, check_choices, check_nonnegative, products_of, weights_of


@runtime_checkable
class Factorization(Protocol):
    """What every factorization can say and do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""

    def numel(self) -> int:
        """Numbers stored."""

    def to_dense(self) -> Tensor:
        """The tensor that the factors stand for."""

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""


@dataclass(frozen=True)
class SVD:
    r"""A matrix as ``U diag(S) V^T``.

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
        """Numbers stored."""
        return self.u.numel() + self.s.numel() + self.vh.numel()

    def to_dense(self) -> Tensor:
        """``U diag(S) V^T``."""
        return (self.u * self.s) @ self.vh

    def pair(self) -> tuple[Tensor, Tensor]:
        """The balanced pair ``(U sqrt(S), sqrt(S) V^T)``, ``[m, r]`` and ``[r, n]``."""
        root = self.s.sqrt()
        return self.u * root, root[:, None] * self.vh

    def truncate(self, rank: int) -> SVD:
        """The leading ``rank`` triplets: the best approximation of that rank (Eckart-Young)."""
        _check_truncation(rank)
        return SVD(self.u[:, :rank], self.s[:rank], self.vh[:rank])

    def relative_error(self, dense: Matrix) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm; of a sparse matrix to about 1e-8."""
        if is_dense(dense):
            return _relative_error(self, dense)
        return _error_without_zeros(self.u * self.s, self.vh, dense)


@dataclass(frozen=True)
class Tucker:
    """A tensor as a core multiplied by a matrix on each mode.

    Args:
        core: the small tensor.
        factors: one matrix a mode; ``None`` where the mode was left whole.

    Shape:
        ``core`` ``[r_0, r_1, ...]``, ``factors[k]`` ``[n_k, r_k]``, dense ``[n_0, n_1, ...]``.

    Examples:
        >>> f = lr.tucker(torch.ones(4, 3, 2), rank=(1, 1, None))
        >>> f.rank, f.numel(), f.to_dense().shape
        ((1, 1, 2), 9, torch.Size([4, 3, 2]))
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        pairs = zip(self.core.shape, self.factors, strict=True)
        return tuple(n if factor is None else factor.shape[0] for n, factor in pairs)

    @property
    def rank(self) -> tuple[int, ...]:
        """Shape of the core."""
        return tuple(self.core.shape)

    def numel(self) -> int:
        """Numbers stored."""
        return self.core.numel() + sum(f.numel() for f in self.factors if f is not None)

    def to_dense(self) -> Tensor:
        """The core times every factor."""
        dense = self.core
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                dense = mode_product(dense, factor, mode)
        return dense

    def truncate(self, rank: tuple[int | None, ...]) -> Tucker:
        """Keeps the leading slices of the core; exact truncation when the core is all-orthogonal (HOSVD).

        Args:
            rank: one entry a mode; ``None`` keeps a mode as it is.
        """
        if len(rank) != self.core.ndim:
            raise LowRankError(f"Tucker.truncate: got {len(rank)} ranks, expected {self.core.ndim}, one a mode.")
        core, factors = self.core, list(self.factors)
        for mode, (r, factor) in enumerate(zip(rank, self.factors, strict=True)):
            if r is None:
                continue
            _check_truncation(r)
            if factor is None:
                raise LowRankError(f"Tucker.truncate: mode {mode} was left whole; give None for it.")
            core = core.narrow(mode, 0, min(r, core.shape[mode]))
            factors[mode] = factor[:, :r]
        return Tucker(core, tuple(factors))

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return _relative_error(self, dense)


@dataclass(frozen=True)
class CP:
    """A tensor as a sum of ``rank`` outer products of unit vectors.

    Args:
        weights: the size of each component, largest first.
        factors: one matrix a mode, columns of unit length.

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
        """Numbers stored."""
        return self.weights.numel() + sum(factor.numel() for factor in self.factors)

    def balanced(self) -> tuple[Tensor, ...]:
        """The factors with the weights spread evenly over them."""
        root = self.weights ** (1 / len(self.factors))
        return tuple(factor * root for factor in self.factors)

    def to_dense(self) -> Tensor:
        """The sum of the components."""
        left = self.factors[0] * self.weights
        for factor in self.factors[1:-1]:
            left = (left[..., None, :] * factor).reshape(-1, self.rank)
        return (left @ self.factors[-1].mT).reshape(self.shape)

    def truncate(self, rank: int) -> CP:
        """Keeps the ``rank`` largest components. Unlike SVD's this is not the best approximation of that rank."""
        _check_truncation(rank)
        return CP(self.weights[:rank], tuple(factor[:, :rank] for factor in self.factors))

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return _relative_error(self, dense)


@dataclass(frozen=True)
class Blocks:
    """The groups of a convolution, each with a factorization of its own, stacked along the first mode.

    Args:
        parts: one factorization a group, all of one shape.

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
        """The rank that all groups have."""
        return self.parts[0].rank

    def numel(self) -> int:
        """Numbers stored."""
        return sum(part.numel() for part in self.parts)

    def to_dense(self) -> Tensor:
        """The groups, one below the other."""
        return torch.cat([part.to_dense() for part in self.parts])

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return _relative_error(self, dense)


@dataclass(frozen=True)
class BlockTT:
    r"""A table as a block tensor train (Oseledets, 2011; Novikov et al., 2015).

    With a row's digits :math:`i_1 \dots i_K` and a column's :math:`j_1 \dots j_K`, the first ones slowest, an entry is
    the product of matrices :math:`G_1[i_1, j_1] \cdots G_K[i_K, j_K]`, of which the first has one row and the last one
    column.

    Args:
        cores: one for each digit.
        rows: how many rows the table has; what the digits can count beyond them is cropped.

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
        """Shape of the dense table."""
        return self.rows, math.prod(core.shape[2] for core in self.cores)

    @property
    def rank(self) -> tuple[int, ...]:
        """The inner bonds."""
        return tuple(core.shape[3] for core in self.cores[:-1])

    def numel(self) -> int:
        """Numbers stored."""
        return sum(core.numel() for core in self.cores)

    def to_dense(self) -> Tensor:
        """The table, without the rows that only fill the digits up."""
        return train_product(self.cores)[: self.rows]

    def truncate(self, rank: tuple[int, ...]) -> BlockTT:
        """The train of smaller bonds by TT-rounding in fp64: within ``sqrt(K - 1)`` of the best one, over all digits.

        Args:
            rank: one entry a bond; bonds that are smaller already stay.
        """
        if len(rank) != len(self.cores) - 1:
            raise LowRankError(f"BlockTT.truncate: got {len(rank)} ranks, expected {len(self.cores) - 1}, one a bond.")
        for r in rank:
            _check_truncation(r)
        small = rounded_train([core.detach().double().flatten(1, 2) for core in self.cores], rank)
        pairs = zip(small, self.cores, strict=True)
        return BlockTT(tuple(new.unflatten(1, old.shape[1:3]).to(old.dtype) for new, old in pairs), self.rows)

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return _relative_error(self, dense)


@dataclass(frozen=True)
class NMF:
    r"""A non-negative matrix as ``W H`` with ``W`` and ``H`` non-negative.

    Args:
        w: the components' weights in every row.
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
        """Numbers stored."""
        return self.w.numel() + self.h.numel()

    def to_dense(self) -> Tensor:
        """``W H``."""
        return self.w @ self.h

    def truncate(self, rank: int) -> NMF:
        """Keeps the ``rank`` components of largest ``||w_k|| ||h_k||``, in their order.

        Unlike SVD's this is not the best approximation of that rank.
        """
        _check_truncation(rank)
        sizes = torch.linalg.vector_norm(self.w.double(), dim=0) * torch.linalg.vector_norm(self.h.double(), dim=1)
        kept = sizes.argsort(descending=True, stable=True)[:rank].sort().values
        return NMF(self.w[:, kept], self.h[kept])

    def transform(
        self, matrix: Matrix, *, loss: Loss = "frobenius", sweeps: int = 1000, tolerance: float = 1e-6
    ) -> Tensor:
        """The weights of these components in new rows: the ``W`` that is best with ``H`` as it is, no entry below zero.

        One convex problem for each row, by HALS or, for ``"kl"``, by multiplicative updates.

        Args:
            matrix: no entry below zero, dense or sparse, as in :func:`nmf`.
            loss: that of the factorization, ``"frobenius"`` or ``"kl"``.
            sweeps: at most this many.
            tolerance: stops when no weight moves by more than this part of the largest one.

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
        check_choices("NMF.transform", sweeps, tolerance, {"loss": (loss, get_args(Loss))})
        wide = found.to(working_dtype(found))
        check_nonnegative(wide, "NMF.transform")
        work, scale = scaled_to_unit(wide)
        h, size = scaled_to_unit(self.h.detach().to(work.device, work.dtype))
        weights = weights_of(products_of(work), h, loss, sweeps, tolerance)
        return (weights.mT * (scale / size)).to(found.dtype).contiguous()

    def relative_error(self, dense: Matrix) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm; of a sparse matrix to about 1e-8."""
        if is_dense(dense):
            return _relative_error(self, dense)
        return _error_without_zeros(self.w, self.h, dense)


def _check_truncation(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise LowRankError(f"truncate: got rank {rank!r}, expected an integer of at least 1.")


def _relative_error(factorization: Factorization, dense: Tensor) -> float:
    if tuple(dense.shape) != tuple(factorization.shape):
        raise LowRankError(
            f"relative_error: got a tensor of shape {tuple(dense.shape)},"
            f" expected {tuple(factorization.shape)}, the shape that was factorized."
        )
    dense = dense.detach().double()
    scale = unit_scale(dense)
    norm = torch.linalg.vector_norm(dense / scale)
    error = torch.linalg.vector_norm((dense - factorization.to_dense().detach().double()) / scale)
    return float(error / norm) if norm > 0 else float(error)


def _error_without_zeros(left: Tensor, right: Tensor, matrix: Matrix) -> float:
    """Of ``L R`` from a sparse matrix: ``||X - L R||^2 = ||X||^2 - 2 <X, L R> + ||L R||^2``."""
    found = check_matrix(matrix, "relative_error")
    assert isinstance(found, SparseMatrix)
    shape = left.shape[0], right.shape[1]
    if tuple(found.shape) != shape:
        raise LowRankError(
            f"relative_error: got a matrix of shape {tuple(found.shape)}, expected {shape}, the shape that was"
            " factorized."
        )
    work, scale = scaled_to_unit(found.double())
    left, right = left.detach().double() / scale, right.detach().double()
    energy = float(work.values.square().sum())
    inner = float(((work @ right.mT) * left).sum())
    model = float(((left.mT @ left) * (right @ right.mT)).sum())
    error = math.sqrt(max(energy - 2 * inner + model, 0.0))
    return error / math.sqrt(energy) if energy > 0 else error * scale
