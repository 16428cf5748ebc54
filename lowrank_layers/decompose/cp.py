"""The canonical polyadic decomposition."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_integer
from ..factors import CP
from ..linalg import (
    check_tensor,
    full_precision,
    khatri_rao,
    leading_eigenvectors,
    narrowed,
    scaled_to_unit,
    unfold,
    working_dtype,
)
from ..linalg.nonnegative import check_choice
from ..rank import Rank, Refit
from .ranks import cp_rank


@full_precision
def cp(
    tensor: Tensor,
    rank: Rank,
    *,
    sweeps: int = 50,
    starts: int = 2,
    tolerance: float = 1e-5,
    init: Literal["hosvd", "random"] = "hosvd",
    seed: int = 0,
) -> CP:
    """Decomposes a tensor into a sum of ``rank`` outer products (canonical polyadic decomposition, CP).

    Alternating least squares (Carroll and Chang, 1970; Harshman, 1970): each sweep solves for one factor after the
    other. Columns are normalized, so that no component diverges against another. A sweep costs two large matrix
    products in any order: the largest mode is contracted once for all the others.

    Args:
        tensor: any float dtype, any device; half precision is computed in fp32 and cast back. Gradients
            do not flow: the input is detached.
        rank: number of components; above the largest rank of use (the product of all modes but the largest) it is
            clamped. At that rank the result is exact. ``ParameterFraction`` counts the values in the factors. Rules
            that look at singular values are refused: no spectrum tells the error at a CP rank. ``CORCONDIA``,
            ``FactorMatch`` and ``CrossValidation`` look at factorizations of several ranks.
        sweeps: largest number of sweeps per start.
        starts: number of starts: first the leading vectors of the HOSVD, then random ones. Each runs a few sweeps, the
            most promising one to the end.
        tolerance: stops when the relative error changes by less than this in a sweep.
        init: ``"hosvd"``, or ``"random"`` for random vectors in the first start too.
        seed: seed of the random vectors; the global generator is untouched.

    Shape:
        ``[n_0, ..., n_{d-1}]``, two or more modes.

    Raises:
        LowRankError: for NaN, Inf, integer, empty or meta input, a rank below 1, and a rule that
            looks at singular values.

    Examples:
        >>> a, b, c = torch.randn(9, 2), torch.randn(8, 2), torch.randn(7, 2)
        >>> tensor = torch.einsum("ir,jr,kr->ijk", a, b, c)
        >>> lr.cp(tensor, rank=2).relative_error(tensor) < 1e-2
        True
    """
    tensor = check_tensor(tensor, "cp")
    check_integer(sweeps, "cp", "sweeps", 1)
    check_integer(starts, "cp", "starts", 1)
    check_choice(init, ("hosvd", "random"), "cp", "init")

    def refit() -> Refit:
        return cp_refit(tensor, sweeps=sweeps, starts=starts, tolerance=tolerance, init=init, seed=seed)

    rank = cp_rank(rank, tensor.shape, "cp", refit)
    work, scale = scaled_to_unit(tensor.to(working_dtype(tensor)))
    if rank >= tensor.numel() // max(tensor.shape):
        weights, factors = _fibres(work)
    else:
        generator = torch.Generator().manual_seed(seed)
        runs = [_Run(work, _start(work, rank, generator, hosvd=k == 0 and init == "hosvd")) for k in range(starts)]
        if starts > 1:
            for run in runs:
                run.sweep(min(5, sweeps), tolerance)
        best = min(runs, key=lambda run: run.error)
        best.sweep(sweeps - best.done, tolerance)
        weights, factors = best.components()
    dtype = tensor.dtype
    return CP(narrowed(weights * scale, dtype, "cp"), tuple(factor.to(dtype).contiguous() for factor in factors))


def cp_refit(tensor: Tensor, **settings: Any) -> Refit:
    """What rules are given that look at decompositions of several ranks; their random starts are single ones.

    Args:
        tensor: the tensor whose rank is chosen.
        **settings: settings of :func:`cp`.
    """

    def fit(tensor: Tensor, rank: int, start: int | None) -> CP:
        once = {} if start is None else {"starts": 1, "init": "random", "seed": start}
        return cp(tensor, rank, **settings | once)

    return Refit(tensor, fit)


def _fibres(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Decomposes exactly at the largest rank of use: each fibre along the largest mode is one component."""
    largest = max(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
    fibres = unfold(tensor, largest).double()
    weights, order = torch.linalg.vector_norm(fibres, dim=0).sort(descending=True)
    columns = fibres[:, order] / weights.where(weights > 0, 1)
    columns[0, weights == 0] = 1
    small = [n for mode, n in enumerate(tensor.shape) if mode != largest]
    places = torch.unravel_index(order, small)
    factors = [torch.eye(n).to(tensor)[:, place] for n, place in zip(small, places, strict=True)]
    factors.insert(largest, columns.to(tensor))
    return weights.to(tensor), factors


class _Run:
    """One start of the iteration, on a copy of the tensor whose modes are sorted by size, largest first."""

    def __init__(self, tensor: Tensor, factors: list[Tensor]) -> None:
        self.order = sorted(range(tensor.ndim), key=lambda mode: -tensor.shape[mode])
        self.tensor = tensor.permute(self.order).contiguous()
        self.factors = [factors[mode] for mode in self.order]
        self.grams = [_gram(factor) for factor in self.factors]
        self.weights = torch.ones_like(self.factors[0][0])
        self.norm = float(torch.linalg.vector_norm(tensor.double()))
        self.error = math.inf
        self.done = 0

    def sweep(self, count: int, tolerance: float) -> None:
        """Runs at most ``count`` sweeps, until the relative error falls by less than the tolerance."""
        for _ in range(count):
            before = self.error
            self._sweep_once()
            self.done += 1
            if before - self.error < tolerance:
                return

    def components(self) -> tuple[Tensor, list[Tensor]]:
        """Weights and factors, the largest component first, in the tensor's order of modes."""
        by_size = self.weights.argsort(descending=True)
        factors = [self.factors[self.order.index(mode)][:, by_size] for mode in range(len(self.order))]
        return self.weights[by_size], factors

    def _sweep_once(self) -> None:
        """Solves for every factor once."""
        others = self.factors[1]
        for factor in self.factors[2:]:
            others = khatri_rao(others, factor)
        self._solve(0, unfold(self.tensor, 0) @ others)
        # the largest mode is contracted once for all the others: [r, n_1, n_2, ...]
        partial = torch.tensordot(self.factors[0], self.tensor, dims=([0], [0]))
        for mode in range(1, len(self.factors)):
            product = self._contract(partial, keep=mode)
            self._solve(mode, product)
        self._measure(product)

    def _contract(self, partial: Tensor, keep: int) -> Tensor:
        """Contracts all modes of ``[r, n_1, n_2, ...]`` but one per component: ``[n_keep, r]``."""
        for mode in range(len(self.factors) - 1, 0, -1):
            if mode != keep:
                axis = mode if mode < keep else partial.ndim - 1
                moved = partial.movedim(axis, -1)
                column = self.factors[mode].mT.reshape(len(self.weights), *[1] * (moved.ndim - 2), -1)
                partial = (moved * column).sum(-1)
        return partial.mT

    def _solve(self, mode: int, product: Tensor) -> None:
        """Solves for one factor, given the matricized tensor times the Khatri-Rao product of the others.

        The normal equations are solved in fp64. Columns have unit length, so their diagonal is 1; the ridge is the
        rounding error of the product, which a nearly dependent component would amplify.
        """
        gram = self._gram_but(mode)
        gram.diagonal().add_(torch.finfo(product.dtype).eps)
        factor = torch.cholesky_solve(product.double().mT, torch.linalg.cholesky(gram)).mT
        norms = torch.linalg.vector_norm(factor, dim=0)
        self.weights = norms.to(product.dtype)
        self.factors[mode] = (factor / norms.clamp_min(1e-300)).to(product.dtype)
        self.grams[mode] = _gram(self.factors[mode])

    def _gram_but(self, skip: int) -> Tensor:
        """Returns the Gram matrix of the Khatri-Rao product of all factors but one."""
        others = [gram for mode, gram in enumerate(self.grams) if mode != skip]
        return math.prod(others[1:], start=others[0].clone())

    def _measure(self, product: Tensor) -> None:
        """Updates the relative error: ``||T - M||^2 = ||T||^2 - 2 <T, M> + ||M||^2``, from the last product."""
        weights = self.weights.double()
        inner = float((product.double() * self.factors[-1].double() * weights).sum())
        gram = self._gram_but(len(self.grams) - 1) * self.grams[-1]
        lost = max(self.norm**2 - 2 * inner + float(weights @ gram @ weights), 0.0)
        self.error = math.sqrt(lost) / self.norm if self.norm > 0 else 0.0


def _gram(factor: Tensor) -> Tensor:
    """Computes ``F^T F`` in fp64."""
    return factor.mT.double() @ factor.double()


def _start(tensor: Tensor, rank: int, generator: torch.Generator, *, hosvd: bool) -> list[Tensor]:
    """Returns random unit columns per mode, for ``hosvd`` with the leading eigenvectors of the unfoldings first."""
    factors = []
    for mode, n in enumerate(tensor.shape):
        factor = torch.randn(n, rank, generator=generator, dtype=torch.float64).to(tensor)
        factor = factor / torch.linalg.vector_norm(factor, dim=0)
        if hosvd:
            matrix = unfold(tensor, mode).double()
            leading = leading_eigenvectors(matrix @ matrix.mT, min(n, rank)).to(tensor)
            factor[:, : leading.shape[1]] = leading
        factors.append(factor)
    return factors
