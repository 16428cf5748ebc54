"""Objectives of non-negative matrix factorization, and updates of one factor that never make them grow.

Factors are ``W^T [r, m]`` and ``H [r, n]``: components are rows, so that each is contiguous.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from .checks import Loss, Stopping
from .products import Products
from .zeros import smallest, tiny

Solver = Literal["hals", "mu"]


class Problem(Protocol):
    """An objective of both factors.

    Attributes:
        floor: fraction of a plain step that an extrapolated one keeps at least.
    """

    floor: float

    def objective(self, w: Tensor, h: Tensor) -> float:
        """Evaluates the objective at these factors, and keeps the products that a step from here begins with."""

    def step(self, w: Tensor, h: Tensor) -> None:
        """Updates the factors in place, from where the objective was evaluated last; never makes it grow."""


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
        """Updates either factor several times with one product with the matrix."""
        self.update(w, self.gram, self.product, self._inner(w))
        self.update(h, w @ w.mT, self.data.left(w), self._inner(h))

    def _inner(self, factor: Tensor) -> int:
        """Number of updates per product with the matrix: as many as cost about as much, at most four."""
        rank, length = factor.shape
        return 1 + min(3, self.data.nnz // (length * rank))


def hals(factor: Tensor, gram: Tensor, product: Tensor, inner: int) -> None:
    """``f_k = max(0, (p_k - sum_{j != k} g_kj f_j) / g_kk)``, one row ``k`` after the other."""
    diagonal = gram.diagonal()
    alive = diagonal > torch.finfo(gram.dtype).eps ** 2 * diagonal.max()
    inverse = torch.where(alive, 1 / diagonal, 0.0)[:, None]
    gram, product = gram * inverse, product * inverse
    # where the other factor vanishes any value is optimal: -1 leaves the row unchanged
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
        """Evaluates the divergence, and keeps the products that a step from here begins with."""
        self.product, log = self.data.quotient_right(w, h)
        model = w.sum(1, dtype=torch.float64) @ h.sum(1, dtype=torch.float64)
        return log - self.total + float(model)

    def step(self, w: Tensor, h: Tensor) -> None:
        """Updates either factor once."""
        multiply_for_divergence(w, self.product, h)
        multiply_for_divergence(h, self.data.quotient_left(w, h), w)


def multiply_for_divergence(factor: Tensor, product: Tensor, other: Tensor) -> None:
    """``F *= P / (sums of the other factor's rows)``."""
    factor.mul_(product).div_(other.sum(1, keepdim=True).clamp_min_(tiny(other))).clamp_min_(smallest(factor))


def weights_of(products: Products, h: Tensor, loss: Loss, stopping: Stopping) -> Tensor:
    """Fits ``W^T [r, m]`` for a fixed ``H``: one convex problem per row of the matrix.

    Args:
        products: products with the matrix.
        h: the non-negative components ``[r, n]``.
        loss: ``"frobenius"`` by HALS, ``"kl"`` by multiplicative updates.
        stopping: the iteration ends when no entry moves by more than this fraction of the largest one.
    """
    m = products.matrix.shape[0]
    if loss == "frobenius":
        gram, product = h @ h.mT, products.right(h)
        w = torch.zeros_like(product)
    else:
        total = float(products.entries.sum(dtype=torch.float64)) / m
        w = h.new_full((len(h), m), total / max(float(h.sum(dtype=torch.float64)), tiny(h)))
    for _ in range(stopping.sweeps):
        before = w.clone()
        if loss == "frobenius":
            hals(w, gram, product, 1)
        else:
            multiply_for_divergence(w, products.quotient_right(w, h)[0], h)
        if float((w - before).abs().max()) <= stopping.tolerance * float(w.max()):
            break
    if loss == "kl":
        w = torch.where(w > 2 * smallest(w), w, 0.0)
    return w
