"""Leading singular triplets of a matrix from products with it alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse import SparseMatrix
from .svd import Triplet

_RESTARTS = 60


def krylov_svd(
    matrix: Tensor | SparseMatrix,
    rank: int,
    *,
    oversample: int = 10,
    depth: int = 3,
    seed: int = 0,
    tolerance: float = 0.0,
    start: Triplet | None = None,
) -> Triplet:
    """Computes leading singular triplets by restarted block Krylov iteration (Musco and Musco, 2015, algorithm 2).

    It is a block power iteration that keeps its powers. It ends when ``||A v - s u||`` is at most ``tolerance s``, or
    of the size of rounding errors.

    Args:
        matrix: ``[m, n]``.
        rank: number of triplets.
        oversample: number of directions per block beyond the rank.
        depth: number of blocks in a Krylov basis before it restarts from its best directions.
        seed: seed of the random directions; the global generator is untouched.
        tolerance: relative residual at which to stop. Then ``A A^T`` has an eigenvalue within ``tolerance s^2`` of
            ``s^2``, and so ``A`` a singular value within about ``tolerance / 2`` of ``s``.
        start: triplets of a similar matrix of the same shape, such as the same weight some steps of training before.
            The first block consists of them and random directions, which find what is new.
    """
    m, n = matrix.shape
    if m > n:
        turned = None if start is None else (start[2].mT, start[1], start[0].mT)
        u, s, vh = krylov_svd(
            matrix.mT, rank, oversample=oversample, depth=depth, seed=seed, tolerance=tolerance, start=turned
        )
        return vh.mT, s, u.mT
    # blocks that would fill the space are extended to all of it: one pass is then exact
    width = rank + oversample if depth * (rank + oversample) <= m else m
    generator = torch.Generator().manual_seed(seed)
    known = torch.empty(n, 0, device=matrix.device, dtype=matrix.dtype) if start is None else start[2].mT[:, :width]
    fresh = torch.randn(n, width - known.shape[1], generator=generator, dtype=torch.float64)
    block = torch.cat([known, fresh.to(matrix.device, matrix.dtype)], 1)
    rounding = torch.finfo(matrix.dtype).eps ** 0.75
    for _ in range(_RESTARTS):
        basis = torch.linalg.qr(_product(matrix, block)).Q
        images = [_product(matrix.mT, basis)]
        for _ in range(1, depth if width < m else 1):
            fresh = _orthonormal(_product(matrix, images[-1]), basis)
            basis = torch.cat([basis, fresh], 1)
            images.append(_product(matrix.mT, fresh))
        # the best triplets of the basis K, from K^T A = R^T Q^T; of Q, only products with a few vectors are formed
        q, tau = torch.geqrf(torch.cat(images, 1))
        small_u, s, small_vh = torch.linalg.svd(q[: q.shape[1]].triu().mT)
        u = basis @ small_u[:, :width]
        v = torch.ormqr(q, tau, F.pad(small_vh[:width].mT, (0, 0, 0, n - q.shape[1])))
        residual = torch.linalg.vector_norm(_product(matrix, v) - u * s[:width], dim=0)[:rank]
        if bool((residual <= tolerance * s[:rank] + rounding * s[0]).all()):
            break
        block = v
    return u[:, :rank], s[:rank], v[:, :rank].mT


def _product(matrix: Tensor | SparseMatrix, block: Tensor) -> Tensor:
    """The product with some columns, as that of rows where the matrix is stored by columns: that is faster."""
    if isinstance(matrix, Tensor) and matrix.stride(0) == 1:
        return (block.mT @ matrix.mT).mT
    return matrix @ block


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormalizes columns against a basis, twice, since what is left of a column may be rounding errors."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block - basis @ (basis.mT @ block)
