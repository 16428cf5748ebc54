"""Orthonormal bases of the shorter side of a gradient: exact, random, or one followed step by step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..linalg import to_unit
from ..linalg.svd import leading_eigenvectors, randomized_svd

ProjectionMethod = Literal["svd", "random", "power"]
POWER_STEPS = 2


def svd_basis(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors ``[short, rank]`` of ``[short, long]``, through the Gram matrix in fp64."""
    wide = matrix.double()
    return leading_eigenvectors(wide @ wide.mT, rank).to(matrix.dtype)


def random_basis(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Directions drawn uniformly; the same in every process, and the global generator is left alone."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(matrix.shape[0], rank, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis.to(matrix)


def power_basis(matrix: Tensor, rank: int, basis: Tensor | None, seed: int) -> Tensor:
    """A few steps of subspace iteration from ``basis``; without one, a randomized SVD to start from."""
    if basis is None:
        return randomized_svd(matrix, rank, power_iterations=POWER_STEPS, seed=seed)[0]
    for _ in range(POWER_STEPS):
        # G G^T squares what is small or large; a gradient of zeros says nothing, and the basis stays
        rows = to_unit(matrix.mT @ basis)
        turned = torch.linalg.qr(matrix @ rows).Q
        basis = torch.where(rows.any(), turned, basis)
    return basis


def factors_basis(short: Tensor, long: Tensor, rank: int, basis: Tensor | None, seed: int) -> Tensor:
    """The leading left singular vectors of ``short @ long^T``, from these factors; what lacks comes from ``basis``.

    Args:
        short: ``[short side, any rank]``.
        long: ``[long side, the same rank]``.
        rank: of the basis.
        basis: the one before; ``None`` draws.
        seed: of what is drawn.
    """
    first, triangle = torch.linalg.qr(short)
    other = torch.linalg.qr(long).R
    leading = (first @ torch.linalg.svd(triangle @ other.mT).U)[:, :rank]
    if leading.shape[1] == rank:
        exact: Tensor = leading
        return exact
    rest = random_basis(short, rank, seed) if basis is None else basis
    whole: Tensor = torch.linalg.qr(torch.cat([leading, rest.to(leading)], 1)).Q[:, :rank]
    return whole


def fitted(matrix: Tensor, rank: int, method: ProjectionMethod, basis: Tensor | None, seed: int) -> Tensor | None:
    """The next basis; ``None`` where the gradient is not finite and cannot give one."""
    if method == "random":
        return random_basis(matrix, rank, seed)
    if not bool(torch.isfinite(matrix).all()):
        return None
    return svd_basis(matrix, rank) if method == "svd" else power_basis(matrix, rank, basis, seed)
