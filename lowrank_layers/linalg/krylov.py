"""Leading singular triplets of a matrix from products with it alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .sparse import SparseMatrix
from .svd import Triplet

_DEPTH = 3
"""Number of blocks in a Krylov basis before it restarts from its best directions."""
_RESTARTS = 60


def krylov_svd(matrix: Tensor | SparseMatrix, rank: int, *, oversample: int = 10, seed: int = 0) -> Triplet:
    """Computes leading singular triplets by restarted block Krylov iteration (Musco and Musco, 2015, algorithm 2).

    It ends when ``||A v - s u||`` is of the size of rounding errors.

    Args:
        matrix: ``[m, n]``.
        rank: number of triplets.
        oversample: number of directions per block beyond the rank.
        seed: seed of the first block; the global generator is untouched.
    """
    m, n = matrix.shape
    if m > n:
        u, s, vh = krylov_svd(matrix.mT, rank, oversample=oversample, seed=seed)
        return vh.mT, s, u.mT
    # a block of a third of the space is extended to all of it: one pass is then exact
    width = rank + oversample if _DEPTH * (rank + oversample) <= m else m
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(n, width, generator=generator, dtype=torch.float64).to(matrix.device, matrix.dtype)
    tolerance = torch.finfo(matrix.dtype).eps ** 0.75
    for _ in range(_RESTARTS):
        basis = torch.linalg.qr(matrix @ block).Q
        images = [matrix.mT @ basis]
        for _ in range(1, _DEPTH if width < m else 1):
            fresh = _orthonormal(matrix @ images[-1], basis)
            basis = torch.cat([basis, fresh], 1)
            images.append(matrix.mT @ fresh)
        # the best triplets of the basis K, from K^T A = R^T Q^T
        q, r = torch.linalg.qr(torch.cat(images, 1))
        small_u, s, small_vh = torch.linalg.svd(r.mT)
        u, v = basis @ small_u, q @ small_vh.mT
        residual = matrix @ v[:, :rank] - u[:, :rank] * s[:rank]
        if float(torch.linalg.vector_norm(residual, dim=0).max()) <= tolerance * float(s[0]):
            break
        block = v[:, :width]
    return u[:, :rank], s[:rank], v[:, :rank].mT


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormalizes columns against a basis, twice, since what is left of a column may be rounding errors."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block - basis @ (basis.mT @ block)
