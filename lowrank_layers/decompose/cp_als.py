"""Alternating least squares for the CP decomposition, from many starts side by side."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from ..linalg import unfold
from .anderson import Anderson


class AlternatingLeastSquares:
    """Accelerated alternating least squares on one tensor (Carroll and Chang, 1970; Mitchell, Ye and De Sterck, 2020).

    A sweep solves for one factor after the other. Columns are normalized, so that no component diverges against
    another. A sweep costs two large matrix products in any order: the first mode is contracted once for all the
    others. It maps the factors of all modes but the first to themselves, which :class:`Anderson` accelerates; an
    extrapolation that raises the error is undone.

    Args:
        tensor: the tensor. Products are computed in its dtype, all else in fp64.
        factors: starts in fp64, for all modes but the first.
        ridge: added to the diagonal of the normal equations, which is 1: what a component costs that cancels others.

    Shape:
        ``tensor`` ``[n_0, ..., n_{d-1}]``, ``factors`` ``[B, n_k, r]`` for ``B`` starts.
    """

    def __init__(self, tensor: Tensor, factors: list[Tensor], ridge: float) -> None:
        self.matrix = unfold(tensor, 0)
        self.sizes = list(tensor.shape[1:])
        self.norm = float(torch.linalg.vector_norm(tensor.double()))
        rank = factors[0].shape[2]
        self.ridge = ridge * torch.eye(rank, dtype=torch.float64, device=tensor.device)
        self.x = self.best = torch.cat(factors, 1)
        self.errors = torch.full(self.x.shape[:1], math.inf, dtype=torch.float64, device=tensor.device)
        self.anderson = Anderson(self.x.flatten(1))

    def sweep(self) -> None:
        """Runs one sweep of every start."""
        _, _, found, errors = self._sweep_once(self.x)
        accepted = errors <= self.errors + torch.finfo(self.matrix.dtype).eps
        which = accepted[:, None, None]
        self.errors = torch.where(accepted, errors, self.errors)
        self.best = torch.where(which, found, self.best)
        following = self.anderson.next(self.x.flatten(1), self.best.flatten(1), accepted)
        self.x = torch.where(which, following.view_as(self.best), self.best)

    def keep(self, count: int) -> None:
        """Gives up all starts but the ``count`` of least error."""
        chosen = self.errors.argsort()[:count]
        self.x, self.best, self.errors = self.x[chosen], self.best[chosen], self.errors[chosen]
        self.anderson.keep(chosen)

    def components(self) -> tuple[Tensor, list[Tensor]]:
        """Returns weights and factors of the start of least error, after a last sweep without extrapolation."""
        self.keep(1)
        weights, first, others, _ = self._sweep_once(self.best)
        return weights[0, 0], [first[0], *others[0].split(self.sizes)]

    def _sweep_once(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solves for every factor once; returns weights, the first factor, the others, and the relative errors."""
        factors = list(x.split(self.sizes, 1))
        grams = [torch.bmm(factor.mT, factor) for factor in factors]
        dtype = self.matrix.dtype
        rounded = [factor.to(dtype) for factor in factors]
        first, weights, gram = self._solve(self.matrix @ reduce(_khatri_rao, rounded), grams)
        grams.insert(0, torch.bmm(first.mT, first))
        # [B, r, n_1, n_2, ...]: each mode but the first in turn, then contracted for those behind it
        partial = (first.mT.to(dtype) @ self.matrix).unflatten(2, self.sizes)
        for mode in range(len(factors)):
            product = partial
            for later in reversed(rounded[mode + 1 :]):
                product = _contract(product, later, product.ndim - 1)
            factors[mode], weights, gram = self._solve(product.mT, grams[: mode + 1] + grams[mode + 2 :])
            grams[mode + 1] = torch.bmm(factors[mode].mT, factors[mode])
            if partial.ndim > 3:
                partial = _contract(partial, factors[mode].to(dtype), 2)
        # ||T - M||^2 = ||T||^2 - 2 <T, M> + ||M||^2
        inner = (product.mT * factors[-1]).sum(1)
        model = torch.bmm(weights, gram * grams[-1])[:, 0]
        lost = self.norm**2 + ((model - 2 * inner) * weights[:, 0]).sum(1)
        return weights, first, torch.cat(factors, 1), lost.clamp_min(0).sqrt() / (self.norm or 1.0)

    def _solve(self, product: Tensor, grams: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Solves for one factor, given the matricized tensor times the Khatri-Rao product of the others.

        Returns the factor, its column norms and the Gram matrix of the Khatri-Rao product.
        """
        gram = reduce(torch.mul, grams)
        factor = torch.linalg.solve_ex(gram + self.ridge, product.double().mT)[0].mT
        weights = torch.linalg.vector_norm(factor, dim=1, keepdim=True)
        return factor / weights.clamp_min(1e-300), weights, gram


def _khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Computes the column-wise Kronecker product per start: ``[B, m, r]`` and ``[B, n, r]`` to ``[B, m * n, r]``."""
    return (left[:, :, None] * right[:, None]).flatten(1, 2)


def _contract(partial: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Contracts one mode of ``[B, r, ...]`` with ``[B, n, r]``, each component with its own column."""
    shape = [*partial.shape[:2], *[1] * (axis - 2), -1, *[1] * (partial.ndim - axis - 1)]
    return (partial * factor.mT.reshape(shape)).sum(axis)
