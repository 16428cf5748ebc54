"""The truncated singular value decomposition, by the method that suits the shape."""

from typing import Literal, get_args

from torch import Tensor

from ..errors import LowRankError
from ..factors import SVD
from ..linalg import (
    Matrix,
    SparseMatrix,
    check_matrix,
    exact_svd,
    full_precision,
    gram_svd,
    krylov_svd,
    narrowed,
    randomized_svd,
    scaled_to_unit,
    working_dtype,
)
from ..rank import Rank, Refit
from .ranks import SMALL, matrix_rank, small_to_dense

Method = Literal["auto", "exact", "randomized", "gram", "krylov"]


@full_precision
def svd(matrix: Matrix, rank: Rank | None = None, *, method: Method = "auto", seed: int = 0) -> SVD:
    """Computes the truncated SVD of a matrix, its best approximation of that rank (Eckart and Young, 1936).

    Args:
        matrix: any float dtype, any device; half precision is computed in fp32 and cast back.
            Gradients do not flow: the input is detached. Sparse matrices of torch (COO, CSR, ...) and of scipy.sparse
            are accepted; a large one is never made dense.
        rank: number of singular triplets; above ``min(m, n)`` it is clamped. ``None`` keeps all of them. A rule such
            as ``Energy(0.95)`` gets all singular values; ``ParameterFraction`` counts the values in a pair of matrices
            ``[m, r]`` and ``[r, n]``.
        method: ``"exact"`` (LAPACK), ``"gram"`` (eigenvectors of the smaller side's Gram matrix in fp64;
            loses singular values below 1e-8 of the largest), ``"randomized"`` (Halko et al., 2011, with four
            power iterations), ``"krylov"`` (restarted block Krylov iteration until it has converged, from products
            with the matrix alone), or ``"auto"``: randomized for ranks below a tenth of a matrix whose smaller
            side exceeds 512, Gram for a matrix at least four times as long as wide, else exact. For a large sparse
            matrix it is Gram where the smaller side is at most 2048, else Krylov.
        seed: seed of the randomized and the Krylov method.

    Shape:
        ``[m, n]``.

    Raises:
        LowRankError: for NaN, Inf, integer, empty or meta input, another number of dimensions, a rank below 1,
            singular values that a half-precision input's dtype cannot hold, and for a large sparse matrix with
            ``"exact"``, or with a rule where the smaller side exceeds 4096.

    Examples:
        >>> weight = torch.randn(60, 40)
        >>> f = lr.svd(weight, rank=10)
        >>> tail = torch.linalg.svdvals(weight)[10:].norm() / weight.norm()
        >>> abs(f.relative_error(weight) - tail.item()) < 1e-5
        True
        >>> lr.svd(weight, rank=lr.RelativeError(0.1)).relative_error(weight) <= 0.1
        True
    """
    if method not in get_args(Method):
        *others, last = map(repr, get_args(Method))
        raise LowRankError(f"svd: got method {method!r}, expected {', '.join(others)} or {last}.")
    found = check_matrix(matrix, "svd")
    wide = found.to(working_dtype(found))
    if rank is None:
        rank = min(found.shape)
    else:
        refit = Refit(matrix, lambda tensor, r, _: svd(tensor, r, method=method, seed=seed))
        rank = matrix_rank(rank, wide, "svd", lambda: refit)
    work, scale = scaled_to_unit(wide)
    if method == "auto":
        method = _pick(work, rank)
    if method == "exact":
        u, s, vh = exact_svd(work if isinstance(work, Tensor) else small_to_dense(work, "svd"))
    elif method == "gram":
        u, s, vh = gram_svd(work, rank)
    elif method == "krylov":
        u, s, vh = krylov_svd(work, rank, seed=seed)
    else:
        u, s, vh = randomized_svd(work, rank, seed=seed)
    parts = u[:, :rank], s[:rank] * scale, vh[:rank]
    return SVD(*(narrowed(part, found.dtype, "svd").contiguous() for part in parts))


def _pick(matrix: Tensor | SparseMatrix, rank: int) -> Method:
    """Chooses the method for ``"auto"``."""
    short, long = sorted(matrix.shape)
    if isinstance(matrix, SparseMatrix) and short * long > SMALL:
        return "gram" if short <= 2048 else "krylov"
    if short > 512 and rank < short // 10:
        return "randomized"
    return "gram" if long >= 4 * short and rank < short else "exact"
