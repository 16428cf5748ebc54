"""Updates that keep the factors of a non-negative matrix non-negative.

Factors are ``W^T [r, m]`` and ``H [r, n]``: components are rows everywhere here, so that each lies in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import LowRankError
from .sparse import SparseMatrix, with_values

Solver = Literal["hals", "mu"]
Loss = Literal["frobenius", "kl"]


def check_choices(who: str, sweeps: object, tolerance: object, words: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Refuses wrong counts and tolerances, and words that are not among the known ones.

    Args:
        who: the caller, which opens the message.
        sweeps: an integer of at least 0.
        tolerance: a number of at least 0.
        words: by argument what was given and what is known.
    """
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise LowRankError(f"{who}: got sweeps {sweeps!r}, expected an integer of at least 0.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise LowRankError(f"{who}: got tolerance {tolerance!r}, expected a number of at least 0.")
    for name, (choice, known) in words.items():
        if choice not in known:
            *others, last = map(repr, known)
            raise LowRankError(f"{who}: got {name} {choice!r}, expected {', '.join(others)} or {last}.")


def check_nonnegative(matrix: Tensor | SparseMatrix, who: str) -> None:
    """Refuses a matrix with entries below zero."""
    entries = matrix if isinstance(matrix, Tensor) else matrix.values
    least = float(entries.min()) if entries.numel() else 0.0
    if least < 0:
        raise LowRankError(
            f"{who}: got a negative entry ({least:.4g}), expected a matrix without; shift it, clip it with"
            " .clamp_min(0), or use svd."
        )


class DenseProducts:
    """The matrix, and the products with it that the updates need."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = self.entries = matrix
        self.nnz = matrix.numel()
        # the quotients of one chunk are all that is ever stored of them
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
        buffer = torch.empty_like(self.matrix[self.chunks[0]])
        for rows in self.chunks:
            part = self.matrix[rows]
            quotient = torch.mm(w[:, rows].mT, h, out=buffer[: len(part)])
            yield rows, part, torch.div(part, quotient.clamp_min_(tiny(quotient)), out=quotient)


class SparseProducts:
    """The same for a sparse matrix: zeros cost nothing."""

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
    """By what suits the matrix: where nine tenths of a dense one are zero, the others are taken alone."""
    if isinstance(matrix, SparseMatrix):
        return SparseProducts(matrix)
    few = matrix.numel() > 2**16 and int(torch.count_nonzero(matrix)) < 0.1 * matrix.numel()
    return SparseProducts(SparseMatrix.of(matrix)) if few and _has_kernels(matrix) else DenseProducts(matrix)


def _times(sparse: Tensor, factor: Tensor) -> Tensor:
    """``factor @ sparse^T`` from row-major operands, which the sparse product is fastest on."""
    product: Tensor = sparse @ factor.mT.contiguous()
    return product.mT.contiguous()


def _quotients(sparse: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """``sparse / own^T other`` where ``sparse`` has entries."""
    if _has_kernels(sparse):
        model = torch.sparse.sampled_addmm(sparse, own.mT.contiguous(), other.mT.contiguous().mT, beta=0.0).values()
    else:
        model = _sampled(sparse, own, other)
    return with_values(sparse, torch.div(sparse.values(), model.clamp_min_(tiny(model)), out=model))


def _sampled(sparse: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """The entries of ``own^T other`` where ``sparse`` has some, without a sparse kernel."""
    counts = sparse.crow_indices().diff()
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    step = max(1, 2**22 // len(own))
    pairs = zip(rows.split(step), sparse.col_indices().split(step), strict=True)
    return torch.cat([(own[:, row] * other[:, column]).sum(0) for row, column in pairs])


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda or (tensor.device.type == "cpu" and torch.backends.mkl.is_available())


def tiny(tensor: Tensor) -> float:
    """What stands in for a zero below a fraction bar: its reciprocal is still finite, and so is that one's square."""
    return float(torch.finfo(tensor.dtype).tiny ** 0.5)


class Problem(Protocol):
    """An objective of both factors.

    Attributes:
        floor: the part of a plain step that an extrapolated one keeps at least.
    """

    floor: float

    def objective(self, w: Tensor, h: Tensor) -> float:
        """At these factors; keeps the products that a step from here begins with."""

    def step(self, w: Tensor, h: Tensor) -> None:
        """In place, from where the objective was computed last; never makes it grow."""


class LeastSquares:
    """``||X - W H||^2 / 2``."""

    def __init__(self, data: Products, solver: Solver) -> None:
        self.data = data
        self.update = hals if solver == "hals" else multiply
        self.floor = 0.0 if solver == "hals" else 0.1
        self.energy = float(torch.linalg.vector_norm(data.entries, dtype=torch.float64)) ** 2

    def objective(self, w: Tensor, h: Tensor) -> float:
        """``||X - W H||^2 = ||X||^2 - 2 <H X^T, W^T> + <W^T W, H H^T>``."""
        self.product, self.gram = self.data.right(h), h @ h.mT
        inner = (self.product * w).sum(dtype=torch.float64)
        model = (self.gram * (w @ w.mT)).sum(dtype=torch.float64)
        return max(self.energy + float(model - 2 * inner), 0.0) / 2

    def step(self, w: Tensor, h: Tensor) -> None:
        """Several updates of either factor from one product with the matrix."""
        self.update(w, self.gram, self.product, self._inner(w))
        self.update(h, w @ w.mT, self.data.left(w), self._inner(h))

    def _inner(self, factor: Tensor) -> int:
        """Updates from one product with the matrix: as many as cost about as much as it, at most four."""
        rank, length = factor.shape
        return 1 + min(3, self.data.nnz // (length * rank))


def hals(factor: Tensor, gram: Tensor, product: Tensor, inner: int) -> None:
    """``f_k = max(0, (p_k - sum_{j != k} g_kj f_j) / g_kk)``, one row ``k`` after the other."""
    diagonal = gram.diagonal()
    alive = diagonal > torch.finfo(gram.dtype).eps ** 2 * diagonal.max()
    inverse = torch.where(alive, 1 / diagonal, 0.0)[:, None]
    gram, product = gram * inverse, product * inverse
    # where the other factor vanishes, anything is optimal: -1 leaves the row as it is
    gram.diagonal().copy_(torch.where(alive, 0.0, -1.0))
    rows = list(zip(factor.unbind(), product.unbind(), gram.unbind(), strict=True))
    columns, target = factor.mT, torch.empty_like(factor[0])
    for _ in range(inner):
        for row, p, g in rows:
            torch.addmv(p, columns, g, alpha=-1, out=target)
            torch.clamp_min(target, 0, out=row)


def multiply(factor: Tensor, gram: Tensor, product: Tensor, inner: int) -> None:
    """``F *= P / G F``."""
    buffer = torch.empty_like(factor)
    for _ in range(inner):
        torch.mm(gram, factor, out=buffer)
        torch.div(product, buffer.clamp_min_(tiny(buffer)), out=buffer)
        factor.mul_(buffer).clamp_min_(smallest(factor))


class Divergence:
    """``sum X log(X / W H) - X + W H``."""

    floor = 0.1

    def __init__(self, data: Products) -> None:
        self.data = data
        self.total = float(data.entries.sum(dtype=torch.float64))

    def objective(self, w: Tensor, h: Tensor) -> float:
        """The divergence; what a step begins with is kept."""
        self.product, log = self.data.quotient_right(w, h)
        model = w.sum(1, dtype=torch.float64) @ h.sum(1, dtype=torch.float64)
        return log - self.total + float(model)

    def step(self, w: Tensor, h: Tensor) -> None:
        """One update of either factor."""
        multiply_for_divergence(w, self.product, h)
        multiply_for_divergence(h, self.data.quotient_left(w, h), w)


def multiply_for_divergence(factor: Tensor, product: Tensor, other: Tensor) -> None:
    """``F *= P / (sums of the other factor's rows)``."""
    factor.mul_(product).div_(other.sum(1, keepdim=True).clamp_min_(tiny(other))).clamp_min_(smallest(factor))


def smallest(factor: Tensor) -> float:
    """What multiplicative updates treat as zero: an entry at exactly zero could never leave it, a denormal is slow."""
    return float(torch.finfo(factor.dtype).eps ** 2)


def weights_of(products: Products, h: Tensor, loss: Loss, sweeps: int, tolerance: float) -> Tensor:
    """The ``W^T [r, m]`` that is best for a fixed ``H``: one convex problem for each row of the matrix.

    Args:
        products: with the matrix.
        h: no entry below zero.
        loss: ``"frobenius"`` by HALS, ``"kl"`` by multiplicative updates.
        sweeps: at most this many.
        tolerance: stops when no entry moves by more than this part of the largest one.
    """
    m = products.matrix.shape[0]
    if loss == "frobenius":
        gram, product = h @ h.mT, products.right(h)
        w = torch.zeros_like(product)
    else:
        total = float(products.entries.sum(dtype=torch.float64)) / m
        w = h.new_full((len(h), m), total / max(float(h.sum(dtype=torch.float64)), tiny(h)))
    for _ in range(sweeps):
        before = w.clone()
        if loss == "frobenius":
            hals(w, gram, product, 1)
        else:
            multiply_for_divergence(w, products.quotient_right(w, h)[0], h)
        if float((w - before).abs().max()) <= tolerance * float(w.max()):
            break
    if loss == "kl":
        w = torch.where(w > 2 * smallest(w), w, 0.0)
    return w
