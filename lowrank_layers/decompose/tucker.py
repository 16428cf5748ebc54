"""The Tucker decomposition."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LowRankError
from ..factors import Tucker
from ..linalg import check_tensor, leading_eigenvectors, mode_product, unfold, working_dtype


def tucker(tensor: Tensor, rank: Sequence[int | None], *, sweeps: int = 20, tolerance: float = 1e-5) -> Tucker:
    """A core and one orthonormal matrix a mode, by higher-order orthogonal iteration (De Lathauwer et al., 2000).

    Starts from the truncated HOSVD; every sweep replaces each factor by the leading eigenvectors of the Gram
    matrix (in fp64) of the tensor projected on all the others, until the fit stops growing.

    Args:
        tensor: any float dtype, any device; half precision is computed in fp32 and cast back. Gradients
            do not flow: the input is detached.
        rank: one entry a mode; ``None`` leaves that mode whole (no factor), ranks above the dimension are clamped.
        sweeps: at most this many; 0 returns the HOSVD.
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
    """
    tensor = check_tensor(tensor, "tucker")
    ranks = _check_ranks(tensor, rank)
    work = tensor.to(working_dtype(tensor))
    modes = [mode for mode, r in enumerate(ranks) if r is not None]
    factors = {mode: _leading(work, mode, ranks[mode]) for mode in modes}
    energy = float(work.double().square().sum())
    error = math.inf
    for _ in range(sweeps if len(modes) > 1 else 0):
        for mode in modes:
            others = _project(work, {k: f for k, f in factors.items() if k != mode})
            factors[mode] = _leading(others, mode, ranks[mode])
        # factors are orthonormal: the error is the energy that the last core does not hold
        core = mode_product(others, factors[modes[-1]].mT, modes[-1])
        lost = max(energy - float(core.double().square().sum()), 0.0)
        before, error = error, math.sqrt(lost / energy) if energy > 0 else 0.0
        if before - error < tolerance:
            break
    core = _project(work, factors)
    dtype = tensor.dtype
    kept = tuple(factors[k].to(dtype).contiguous() if k in factors else None for k in range(tensor.ndim))
    return Tucker(core.to(dtype).contiguous(), kept)


def _leading(tensor: Tensor, mode: int, rank: int | None) -> Tensor:
    matrix = unfold(tensor, mode).double()
    assert rank is not None
    return leading_eigenvectors(matrix @ matrix.mT, rank).to(tensor.dtype)


def _project(tensor: Tensor, factors: dict[int, Tensor]) -> Tensor:
    """Multiplies by the transposed factors, those that shrink most first."""
    for mode in sorted(factors, key=lambda k: factors[k].shape[1] / factors[k].shape[0]):
        tensor = mode_product(tensor, factors[mode].mT, mode)
    return tensor


def _check_ranks(tensor: Tensor, rank: Sequence[int | None]) -> list[int | None]:
    if isinstance(rank, (int, float, str)) or not isinstance(rank, Sequence):
        raise LowRankError(
            f"tucker: got rank {rank!r}, expected one entry a mode, as in {(1,) * tensor.ndim};"
            " None leaves a mode whole."
        )
    if len(rank) != tensor.ndim:
        raise LowRankError(f"tucker: got {len(rank)} ranks for {tensor.ndim} modes; None leaves a mode whole.")
    for r in rank:
        if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
            raise LowRankError(f"tucker: got rank {r!r}, expected integers of at least 1, or None.")
    return [None if r is None else min(r, n) for r, n in zip(rank, tensor.shape, strict=True)]


def tucker_spectrum(tensor: Tensor, mode: int) -> Tensor:
    """Singular values of one unfolding, largest first, in fp64."""
    matrix = unfold(tensor, mode).double()
    values = torch.linalg.eigvalsh(matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix)
    return values.flip(0).clamp_min(0).sqrt()
