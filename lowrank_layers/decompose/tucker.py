"""The Tucker decomposition."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..factors import Tucker
from ..linalg import check_tensor, full_precision, mode_product, narrowed, scaled_to_unit, unfold, working_dtype
from ..rank import Rank, RankRule
from .tucker_ranks import mode_ranks


@full_precision
def tucker(
    tensor: Tensor, rank: RankRule | Sequence[Rank | None], *, sweeps: int = 20, tolerance: float = 1e-4
) -> Tucker:
    """Decomposes a tensor into a small core and one orthonormal matrix per mode (Tucker decomposition).

    Higher-order orthogonal iteration (HOOI; De Lathauwer et al., 2000) from the sequentially truncated HOSVD
    (Vannieuwenhoven et al., 2012): every sweep replaces each factor by the leading eigenvectors of the Gram matrix, in
    fp64, of the tensor projected on all the others, until the fit stops growing.

    Args:
        tensor: any float dtype, any device; half precision is computed in fp32 and cast back. Gradients
            do not flow: the input is detached.
        rank: one entry per mode: an integer (above the dimension it is clamped), a rule, or ``None``, which leaves the
            mode whole (no factor). A rule gets the singular values of the unfolding of its mode; modes with
            ``ParameterFraction`` shrink in proportion, until core and factors together hold no more than the fraction.
            One rule in place of the entries applies to every mode.
        sweeps: largest number of sweeps; 0 returns the start.
        tolerance: stops when the relative error changes by less than this in a sweep.

    Shape:
        ``[n_0, ..., n_{d-1}]``, two or more modes.

    Raises:
        LowRankError: for NaN, Inf, integer, empty or meta input, a wrong number of ranks, a rank below 1.

    Examples:
        >>> kernel = torch.randn(16, 8, 3, 3)
        >>> f = lr.tucker(kernel, rank=(16, 8, None, None))
        >>> torch.allclose(f.to_dense(), kernel, atol=1e-5)
        True
        >>> f = lr.tucker(kernel, rank=(lr.ParameterFraction(0.5), lr.ParameterFraction(0.5), None, None))
        >>> f.rank, f.numel() / kernel.numel() <= 0.5
        ((9, 4, 3, 3), True)
    """
    tensor = check_tensor(tensor, "tucker")
    wide = tensor.to(working_dtype(tensor))
    ranks = mode_ranks(rank, wide, "tucker")
    work, scale = scaled_to_unit(wide)
    core = work
    energy = float(torch.linalg.vector_norm(work, dtype=torch.float64)) ** 2
    factors: dict[int, Tensor] = {}
    kept = energy
    for mode, r in enumerate(ranks):
        if r is not None:
            factors[mode], kept = _leading(core, mode, r)
            core = mode_product(core, factors[mode].mT, mode)
    error = _error(energy, kept)
    for _ in range(sweeps if len(factors) > 1 else 0):
        for mode in factors:
            others = _project(work, {k: f for k, f in factors.items() if k != mode})
            factors[mode], kept = _leading(others, mode, factors[mode].shape[1])
        core = mode_product(others, factors[mode].mT, mode)
        before, error = error, _error(energy, kept)
        if before - error < tolerance:
            break
    dtype = tensor.dtype
    matrices = (factors[k].to(dtype).contiguous() if k in factors else None for k in range(tensor.ndim))
    return Tucker(narrowed(core * scale, dtype, "tucker").contiguous(), tuple(matrices))


def _leading(tensor: Tensor, mode: int, rank: int) -> tuple[Tensor, float]:
    """Returns the leading left singular vectors of one unfolding, and the energy that they keep."""
    matrix = unfold(tensor, mode).double()
    rows, columns = matrix.shape
    if rank <= columns < rows:
        values, right = torch.linalg.eigh(_lower_gram(matrix.mT))
        # A V = U S; QR instead of dividing by S keeps the columns of vanishing singular values orthonormal
        vectors = torch.linalg.qr(matrix @ right.flip(1)[:, :rank]).Q
    else:
        values, left = torch.linalg.eigh(_lower_gram(matrix))
        vectors = left.flip(1)[:, :rank]
    return vectors.to(tensor.dtype), float(values[-rank:].sum())


def _lower_gram(matrix: Tensor) -> Tensor:
    """Computes the lower triangle of ``A A^T``, which is all that ``eigh`` reads, in four strips."""
    n = len(matrix)
    gram = matrix.new_zeros(n, n)
    width = -(-n // 4)
    for start in range(0, n, width):
        strip = slice(start, start + width)
        gram[start:, strip] = matrix[start:] @ matrix[strip].mT
    return gram


def _error(energy: float, kept: float) -> float:
    """Returns the relative error from the energy that the core holds, since factors are orthonormal."""
    return math.sqrt(max(energy - kept, 0.0) / energy) if energy > 0 else 0.0


def _project(tensor: Tensor, factors: dict[int, Tensor]) -> Tensor:
    """Multiplies a tensor by the transposed factors, those that shrink it most first."""
    for mode in sorted(factors, key=lambda k: factors[k].shape[1] / factors[k].shape[0]):
        tensor = mode_product(tensor, factors[mode].mT, mode)
    return tensor
