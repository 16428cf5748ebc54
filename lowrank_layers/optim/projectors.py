"""Projectors of gradients (GaLore): orthonormal bases of their shorter side, exact, random or by power iteration."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..linalg import to_unit
from ..linalg.svd import leading_eigenvectors, randomized_svd

ProjectionMethod = Literal["svd", "random", "power"]
POWER_STEPS = 2


def svd_projector(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors ``[short, rank]`` of ``[short, long]``, through the Gram matrix in fp64."""
    wide = matrix.double()
    return leading_eigenvectors(wide @ wide.mT, rank).to(matrix.dtype)


def random_projector(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """A uniformly random basis, the same in every process; the global generator is not used.

    Args:
        matrix: gradient ``[short, long]``, which gives the number of rows, dtype and device.
        rank: number of columns.
        seed: seed of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(matrix.shape[0], rank, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis.to(matrix)


def power_projector(matrix: Tensor, rank: int, last: Tensor | None, seed: int) -> Tensor:
    """A few steps of subspace iteration from the last projector; without one, a randomized SVD.

    Args:
        matrix: gradient ``[short, long]``.
        rank: number of columns.
        last: the last projector, or ``None``.
        seed: seed of the randomized SVD.
    """
    if last is None:
        return randomized_svd(matrix, rank, power_iterations=POWER_STEPS, seed=seed)[0]
    projector = last
    for _ in range(POWER_STEPS):
        # G G^T would square what is small or large; a gradient of zeros leaves the projector as it is
        rows = to_unit(matrix.mT @ projector)
        iterated = torch.linalg.qr(matrix @ rows).Q
        projector = torch.where(rows.any(), iterated, projector)
    return projector


def projector_of_factors(short: Tensor, long: Tensor, rank: int, last: Tensor | None, seed: int) -> Tensor:
    """The leading left singular vectors of ``short @ long^T``, computed from these factors.

    Args:
        short: factor ``[short side, r]``.
        long: factor ``[long side, r]``.
        rank: number of columns.
        last: the last projector, which fills up what the factors lack to ``rank``; ``None`` fills up with random ones.
        seed: seed of the random ones.
    """
    q, triangle = torch.linalg.qr(short)
    other = torch.linalg.qr(long).R
    leading: Tensor = (q @ torch.linalg.svd(triangle @ other.mT).U)[:, :rank]
    if leading.shape[1] == rank:
        return leading
    rest = random_projector(short, rank, seed) if last is None else last
    filled: Tensor = torch.linalg.qr(torch.cat([leading, rest.to(leading)], 1)).Q[:, :rank]
    return filled


def fit_projector(matrix: Tensor, rank: int, method: ProjectionMethod, last: Tensor | None, seed: int) -> Tensor | None:
    """The next projector; ``None`` where a gradient that is not finite cannot give one.

    Args:
        matrix: gradient ``[short, long]``.
        rank: number of columns.
        method: how the projector is found.
        last: the last projector, or ``None``.
        seed: seed of what is random.
    """
    if method == "random":
        return random_projector(matrix, rank, seed)
    if not bool(torch.isfinite(matrix).all()):
        return None
    return svd_projector(matrix, rank) if method == "svd" else power_projector(matrix, rank, last, seed)
