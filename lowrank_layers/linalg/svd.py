"""Singular value decompositions by three methods, as ``U [m, k]``, ``S [k]`` (descending) and ``Vh [k, n]``."""

import torch
from torch import Tensor

from .sparse import SparseMatrix

Triplet = tuple[Tensor, Tensor, Tensor]
_MANY = 512
"""Rows and columns of a matrix of which an SVD takes long."""
_ACCURATE = 1e-4
"""Singular values over the largest one above which triplets from a Gram matrix are as good as those of an SVD."""


def exact_svd(matrix: Tensor) -> Triplet:
    """Computes all singular triplets by LAPACK or cuSOLVER, in the precision of the input."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def gram_svd(matrix: Tensor | SparseMatrix, rank: int) -> Triplet:
    """Computes leading triplets from the eigenvectors of the smaller side's Gram matrix, formed in fp64.

    With ``m <= n``: ``A A^T = U S^2 U^T`` and ``S V^T = U^T A``. Squaring halves the digits, so singular values below
    ``1e-8`` of the largest are noise. For a thin matrix and a truncated result this is by far the fastest method, and
    as accurate as the exact one.

    Args:
        matrix: ``[m, n]``.
        rank: number of triplets.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = gram_svd(matrix.mT, rank)
        return vh.mT, s, u.mT
    wide = matrix.double()
    u = leading_eigenvectors(gram(wide), rank)
    # S V^T = U^T A: the norms of its rows are accurate where the square roots of eigenvalues are not
    rows = (wide.mT @ u).mT
    order = torch.linalg.vector_norm(rows, dim=1).argsort(descending=True)
    u, rows = u[:, order], rows[order]
    # QR restores the orthogonality of rows of tiny norm, and completes the basis where they vanish
    q, r = torch.linalg.qr(rows.mT)
    s = r.diagonal().abs()
    vh = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT
    return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)


def leading_svd(matrix: Tensor, rank: int) -> Triplet:
    """Computes leading triplets from the Gram matrix where that loses nothing and saves much, else exactly.

    Of a matrix of some thousand rows and columns it takes a third of the time. Eigenvectors of the Gram matrix lose
    digits with the square of the singular values; above ``1e-4`` of the largest one half of the digits are left, and
    what the best approximation loses by that is of the order of rounding.

    Args:
        matrix: ``[m, n]``.
        rank: number of triplets.
    """
    least, most = sorted(matrix.shape)
    # on a GPU eigenvectors take a fraction of the time of an SVD
    if most >= 4 * least or matrix.is_cuda:
        return gram_svd(matrix, rank)
    if least >= _MANY and rank:
        u, s, vh = gram_svd(matrix, rank)
        if s[-1] > _ACCURATE * s[0]:
            return u, s, vh
    u, s, vh = exact_svd(matrix)
    return u[:, :rank], s[:rank], vh[:rank]


def randomized_svd(
    matrix: Tensor | SparseMatrix, rank: int, *, oversample: int = 10, power_iterations: int = 4, seed: int = 0
) -> Triplet:
    """Computes leading triplets from a random range with power iterations.

    Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1.

    Args:
        matrix: ``[m, n]``.
        rank: number of triplets.
        oversample: number of random directions beyond the rank.
        power_iterations: number of power iterations; a slowly decaying spectrum needs more.
        seed: seed of the random directions; the global generator is untouched.
    """
    m, n = matrix.shape
    width = min(rank + oversample, m, n)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(n, width, generator=generator, dtype=torch.float64).to(matrix.device, matrix.dtype)
    basis = torch.linalg.qr(matrix @ basis).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd((matrix.mT @ basis).mT, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def gram(matrix: Tensor | SparseMatrix) -> Tensor:
    """Computes ``A A^T``."""
    return matrix @ matrix.mT if isinstance(matrix, Tensor) else matrix.gram()


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Returns the eigenvectors of the largest eigenvalues of a symmetric matrix, largest first, in fp64."""
    vectors: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors.flip(1)[:, :rank]
