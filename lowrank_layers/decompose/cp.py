"""The canonical polyadic decomposition."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_integer
from ..factors import CP
from ..linalg import (
    check_tensor,
    full_precision,
    leading_eigenvectors,
    narrowed,
    scaled_to_unit,
    unfold,
    working_dtype,
)
from ..linalg.nonnegative import check_choice
from ..rank import Rank, Refit
from .cp_als import AlternatingLeastSquares
from .ranks import cp_rank


@full_precision
def cp(
    tensor: Tensor,
    rank: Rank,
    *,
    sweeps: int = 80,
    starts: int | None = None,
    tolerance: float = 1e-5,
    init: Literal["hosvd", "random"] = "hosvd",
    seed: int = 0,
) -> CP:
    """Decomposes a tensor into a sum of ``rank`` outer products (canonical polyadic decomposition, CP).

    Alternating least squares (Carroll and Chang, 1970; Harshman, 1970) with Anderson acceleration (Mitchell, Ye and De
    Sterck, 2020), from several starts, of which the one of least error is returned. A sweep solves for one factor after
    the other, in the order of the modes; it takes the time of two large matrix products.

    Args:
        tensor: any float dtype, any device; half precision is computed in fp32 and cast back. Gradients
            do not flow: the input is detached.
        rank: number of components; above the largest rank of use (the product of all modes but the largest) it is
            clamped. At that rank the result is exact. ``ParameterFraction`` counts the values in the factors. Rules
            that look at singular values are refused: no spectrum tells the error at a CP rank. ``CORCONDIA``,
            ``FactorMatch`` and ``CrossValidation`` look at factorizations of several ranks.
        sweeps: largest number of sweeps.
        starts: number of starts: first the leading vectors of the HOSVD, then random ones. ``None``: 12 for up to 4,096
            values, where they take little more time than one, else 6. Of a larger tensor the worse half of the starts
            is given up every ten sweeps.
        tolerance: stops when in the next ten sweeps no start would come below the least relative error by this much,
            each at the pace of its last ten.
        init: ``"hosvd"``, or ``"random"`` for random vectors in the first start too.
        seed: seed of the random vectors; the global generator is untouched.

    Shape:
        ``[n_0, ..., n_{d-1}]``, two or more modes.

    Raises:
        LowRankError: for NaN, Inf, integer, empty or meta input, a rank below 1, and a rule that
            looks at singular values.

    Examples:
        >>> a, b, c = torch.randn(9, 2), torch.randn(8, 2), torch.randn(7, 2)
        >>> tensor = torch.einsum("ir,jr,kr->ijk", a, b, c)
        >>> lr.cp(tensor, rank=2).relative_error(tensor) < 1e-2
        True
    """
    tensor = check_tensor(tensor, "cp")
    check_integer(sweeps, "cp", "sweeps", 1)
    if starts is not None:
        check_integer(starts, "cp", "starts", 1)
    check_choice(init, ("hosvd", "random"), "cp", "init")
    settings: dict[str, Any] = {"sweeps": sweeps, "starts": starts, "tolerance": tolerance, "init": init, "seed": seed}
    rank = cp_rank(rank, tensor.shape, "cp", lambda: cp_refit(tensor, **settings))
    work, scale = scaled_to_unit(tensor.to(working_dtype(tensor)))
    if rank >= tensor.numel() // max(tensor.shape):
        weights, factors = _fibres(work)
    else:
        weights, factors = _search(work, rank, **settings)
    dtype = tensor.dtype
    return CP(narrowed(weights * scale, dtype, "cp"), tuple(factor.to(dtype).contiguous() for factor in factors))


def cp_refit(tensor: Tensor, **settings: Any) -> Refit:
    """What rules are given that look at decompositions of several ranks; their random starts are single ones.

    Args:
        tensor: the tensor whose rank is chosen.
        **settings: settings of :func:`cp`.
    """

    def fit(tensor: Tensor, rank: int, start: int | None) -> CP:
        once = {} if start is None else {"starts": 1, "init": "random", "seed": start}
        return cp(tensor, rank, **settings | once)

    return Refit(tensor, fit)


def _fibres(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Decomposes exactly at the largest rank of use: each fibre along the largest mode is one component."""
    largest = max(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
    fibres = unfold(tensor, largest).double()
    weights, order = torch.linalg.vector_norm(fibres, dim=0).sort(descending=True)
    columns = fibres[:, order] / weights.where(weights > 0, 1)
    columns[0, weights == 0] = 1
    small = [n for mode, n in enumerate(tensor.shape) if mode != largest]
    places = torch.unravel_index(order, small)
    factors = [torch.eye(n).to(tensor)[:, place] for n, place in zip(small, places, strict=True)]
    factors.insert(largest, columns.to(tensor))
    return weights.to(tensor), factors


SMALL = 2**12
"""Number of values up to which a sweep of many starts takes about the time of one."""

STEP = 10
"""Number of sweeps after which starts are compared."""


def _search(
    tensor: Tensor, rank: int, *, sweeps: int, starts: int | None, tolerance: float, init: str, seed: int
) -> tuple[Tensor, list[Tensor]]:
    """Weights and factors of the best of several starts, the largest component first."""
    small = tensor.numel() <= SMALL
    count = starts or (12 if small else 6)
    # components that cancel leave the rounding errors of what they cancel
    ridge = torch.finfo(tensor.dtype).eps
    als = AlternatingLeastSquares(
        tensor.double() if small else tensor, _start(tensor, rank, count, seed, init)[1:], ridge
    )
    with torch.inference_mode():  # a sixth of the time of small operations
        for done in range(0, sweeps, STEP):
            before = als.errors
            for _ in range(min(STEP, sweeps - done)):
                als.sweep()
            expected = als.errors - (before - als.errors)
            if bool((expected > als.errors.min() - tolerance).all()):
                break
            if not small:
                als.keep((len(als.errors) + 1) // 2)
        weights, factors = als.components()
    # indexing copies, out of inference mode
    by_size = weights.argsort(descending=True)
    return weights[by_size], [factor[:, by_size] for factor in factors]


def _start(tensor: Tensor, rank: int, count: int, seed: int, init: str) -> list[Tensor]:
    """Returns random unit columns per mode, for ``"hosvd"`` with the leading vectors of the HOSVD in the first start.

    Shape:
        ``[count, n_k, rank]`` per mode, in fp64.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for mode, n in enumerate(tensor.shape):
        factor = torch.randn(count, n, rank, generator=generator, dtype=torch.float64).to(tensor.device)
        factor = factor / torch.linalg.vector_norm(factor, dim=1, keepdim=True)
        if init == "hosvd":
            matrix = unfold(tensor, mode).double()
            leading = leading_eigenvectors(matrix @ matrix.mT, min(n, rank))
            factor[0, :, : leading.shape[1]] = leading
        factors.append(factor)
    return factors
