"""The singular value decomposition, by the way that suits the shape."""

from typing import Literal

from torch import Tensor

from ..errors import LowRankError
from ..factors import SVD
from ..linalg import check_tensor, exact_svd, gram_svd, narrowed, randomized_svd, scaled_to_unit, working_dtype
from ..rank import Rank
from .ranks import matrix_rank

Method = Literal["auto", "exact", "randomized", "gram"]


def svd(matrix: Tensor, rank: Rank | None = None, *, method: Method = "auto", seed: int = 0) -> SVD:
    """The best approximation of a matrix by one of rank ``rank`` (Eckart and Young, 1936).

    Args:
        matrix: any float dtype, any device; half precision is computed in fp32 and cast back.
            Gradients do not flow: the input is detached.
        rank: number of singular triplets; above ``min(m, n)`` it is clamped. ``None`` keeps all of them. A rule such
            as ``Energy(0.95)`` looks at all singular values first; ``ParameterFraction`` counts the numbers of a pair
            of matrices ``[m, r]`` and ``[r, n]``.
        method: ``"exact"`` (LAPACK), ``"gram"`` (eigenvectors of the smaller side's Gram matrix in fp64;
            loses singular values below 1e-8 of the largest), ``"randomized"`` (Halko et al., 2011, with four
            power iterations), or ``"auto"``: randomized for ranks below a tenth of a matrix whose smaller
            side exceeds 512, Gram for a matrix at least four times as long as wide, else exact.
        seed: of the randomized method.

    Shape:
        ``[m, n]``.

    Raises:
        LowRankError: for NaN, Inf, integer, empty or meta input, another number of dimensions, a rank below 1, and
            singular values that a half-precision input's dtype cannot hold.

    Examples:
        >>> weight = torch.randn(60, 40)
        >>> f = lr.svd(weight, rank=10)
        >>> tail = torch.linalg.svdvals(weight)[10:].norm() / weight.norm()
        >>> abs(f.relative_error(weight) - tail.item()) < 1e-5
        True
        >>> lr.svd(weight, rank=lr.RelativeError(0.1)).relative_error(weight) <= 0.1
        True
    """
    matrix = check_tensor(matrix, "svd", ndim=2)
    wide = matrix.to(working_dtype(matrix))
    rank = min(matrix.shape) if rank is None else matrix_rank(rank, wide, "svd")
    work, scale = scaled_to_unit(wide)
    if method == "auto":
        method = _pick(matrix.shape[0], matrix.shape[1], rank)
    if method == "exact":
        u, s, vh = exact_svd(work)
    elif method == "gram":
        u, s, vh = gram_svd(work, rank)
    elif method == "randomized":
        u, s, vh = randomized_svd(work, rank, seed=seed)
    else:
        raise LowRankError(f"svd: got method {method!r}, expected 'auto', 'exact', 'randomized' or 'gram'.")
    parts = u[:, :rank], s[:rank] * scale, vh[:rank]
    return SVD(*(narrowed(part, matrix.dtype, "svd").contiguous() for part in parts))


def _pick(rows: int, columns: int, rank: int) -> Method:
    short, long = sorted((rows, columns))
    if short > 512 and rank < short // 10:
        return "randomized"
    return "gram" if long >= 4 * short and rank < short else "exact"
