"""Three ways to the leading singular triplets. All return ``U [m, k]``, ``S [k]`` (descending), ``Vh [k, n]``."""

import torch
from torch import Tensor

Triplet = tuple[Tensor, Tensor, Tensor]


def exact_svd(matrix: Tensor) -> Triplet:
    """LAPACK's (or cuSOLVER's) full decomposition, in the precision of the input."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def gram_svd(matrix: Tensor, rank: int) -> Triplet:
    """Through the eigenvectors of the Gram matrix of the smaller side, formed in fp64.

    With ``m <= n``: ``A A^T = U S^2 U^T`` and ``S V^T = U^T A``. Squaring halves the digits, so a singular
    value below ``1e-8`` of the largest is noise; for a thin matrix and a truncated result this is by far
    the fastest way and as good as the exact one.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = gram_svd(matrix.mT, rank)
        return vh.mT, s, u.mT
    wide = matrix.double()
    u = leading_eigenvectors(wide @ wide.mT, rank)
    # S V^T = U^T A has orthogonal rows; taking their norms keeps small values accurate
    rows = u.mT @ wide
    s = torch.linalg.vector_norm(rows, dim=1)
    order = s.argsort(descending=True)
    u, s, rows = u[:, order], s[order], rows[order]
    vh = _orthonormal_rows(rows, s)
    return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)


def randomized_svd(
    matrix: Tensor, rank: int, *, oversample: int = 10, power_iterations: int = 4, seed: int = 0
) -> Triplet:
    """Range finder with power iterations (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1).

    Args:
        matrix: ``[m, n]``.
        rank: number of triplets.
        oversample: extra random directions.
        power_iterations: more of them sharpen a slowly decaying spectrum.
        seed: of the random directions; the global generator is left alone.
    """
    m, n = matrix.shape
    width = min(rank + oversample, m, n)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(n, width, generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.linalg.qr(matrix @ basis).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the ``rank`` largest eigenvalues of a symmetric matrix, largest first, in fp64."""
    vectors: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors.flip(1)[:, :rank]


def _orthonormal_rows(rows: Tensor, norms: Tensor) -> Tensor:
    """Rows over their norms; those that are zero up to rounding become any orthonormal completion."""
    null = norms <= norms[0] * 1e-12
    if not bool(null.any()):
        return rows / norms[:, None]
    kept = rows[~null] / norms[~null, None]
    generator = torch.Generator().manual_seed(0)
    filler = torch.randn(int(null.sum()), rows.shape[1], generator=generator, dtype=rows.dtype).to(rows.device)
    filler = filler - (filler @ kept.mT) @ kept
    filler = filler - (filler @ kept.mT) @ kept
    return torch.cat([kept, torch.linalg.qr(filler.mT).Q.mT])
