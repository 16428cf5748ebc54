"""Non-negative matrix factorization."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import LowRankError
from ..factors import NMF
from ..linalg import (
    Matrix,
    SparseMatrix,
    check_matrix,
    full_precision,
    gram_svd,
    randomized_svd,
    scaled_to_unit,
    working_dtype,
)
from ..linalg.nonnegative import (
    Divergence,
    LeastSquares,
    Loss,
    Problem,
    Solver,
    Stopping,
    check_choice,
    check_nonnegative,
    products_of,
    smallest,
    tiny,
)
from ..rank import Rank, Refit
from .ranks import matrix_rank
from .svd import svd

Init = Literal["nndsvda", "nndsvd", "random"]
_RANDOM: Init = "random"


@full_precision
def nmf(
    matrix: Matrix,
    rank: Rank,
    *,
    solver: Solver = "hals",
    loss: Loss = "frobenius",
    init: Init = "nndsvda",
    sweeps: int = 200,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> NMF:
    r"""Factorizes a non-negative matrix into two non-negative factors, ``X`` nearly ``W H``.

    Every sweep updates ``W``, then ``H``, and extrapolates in the direction of the step (Ang and Gillis, 2019); where
    that does not lower the objective, the plain step is taken, which never raises it.

    Args:
        matrix: non-negative, of any float dtype on any device; half precision is computed in fp32 and cast back.
            Gradients do not flow: the input is detached. Sparse matrices of torch (COO, CSR, ...) and of scipy.sparse
            are accepted, and never made dense. Where nine tenths of a dense matrix are zero, its zeros cost nothing.
        rank: number of components; above ``min(m, n)`` it is clamped. At that rank the result is exact: the matrix
            itself and the identity. A rule gets the singular values of the matrix. Their tail is the smallest error of
            any factorization of that rank; that of non-negative factors may be larger than the rule asks for.
        solver: ``"hals"``, exact minimisation over one component after the other (Cichocki and Phan, 2009), or
            ``"mu"``, multiplicative updates (Lee and Seung, 2001), slower to converge and the only one for ``"kl"``.
            Both use a product with the matrix several times where that is cheap (Gillis and Glineur, 2012).
        loss: ``"frobenius"``, ``||X - W H||^2 / 2``, or ``"kl"``, the generalised Kullback-Leibler divergence
            ``sum X log(X / W H) - X + W H``, which suits counts.
        init: ``"nndsvd"`` (Boutsidis and Gallopoulos, 2008), the non-negative parts of the singular vectors;
            ``"nndsvda"``, the same with the mean of the matrix (scaled to a largest entry between 1 and 2) in place
            of zeros; or ``"random"``. Multiplicative updates leave zeros only slowly: use one of the last two.
        sweeps: largest number of sweeps; 0 returns the start.
        tolerance: stops when the objective ``D`` falls by too little in ten sweeps,
            ``D[t - 10] - D[t] <= tolerance * D[t]``.
        seed: seed of the random start, and of the randomized SVD of a large matrix; the global generator is untouched.

    Shape:
        ``[m, n]``.

    Raises:
        LowRankError: for negative, NaN, Inf, integer, empty or meta input, another number of dimensions, a rank below
            1, ``"kl"`` with ``"hals"``.

    Examples:
        >>> w, h = torch.rand(30, 3), torch.rand(3, 20)
        >>> f = lr.nmf(w @ h, rank=3, tolerance=0)
        >>> f.relative_error(w @ h) < 1e-2, bool((f.w >= 0).all() and (f.h >= 0).all())
        (True, True)
        >>> counts = torch.poisson(5 * w @ h)
        >>> lr.nmf(counts, rank=3, solver="mu", loss="kl").h.shape
        torch.Size([3, 20])
    """
    found = check_matrix(matrix, "nmf")
    for name, choice, known in (("solver", solver, Solver), ("loss", loss, Loss), ("init", init, Init)):
        check_choice(choice, get_args(known), "nmf", name)
    if loss == "kl" and solver == "hals":
        raise LowRankError(
            "nmf: got solver 'hals' with loss 'kl', expected solver 'mu': HALS solves least squares only."
        )
    stopping = Stopping(sweeps, tolerance)
    stopping.check("nmf")
    wide = found.to(working_dtype(found))
    check_nonnegative(wide, "nmf")
    m, n = found.shape

    def fit(tensor: Matrix, rank: int, start: int | None) -> NMF:
        begin, number = (init, seed) if start is None else (_RANDOM, start)
        return nmf(tensor, rank, solver=solver, loss=loss, init=begin, sweeps=sweeps, tolerance=tolerance, seed=number)

    rank = matrix_rank(rank, wide, "nmf", lambda: Refit(matrix, fit))
    if rank == min(m, n):
        eye = torch.eye(min(m, n), dtype=found.dtype, device=found.device)
        dense = found.clone(memory_format=torch.contiguous_format) if isinstance(found, Tensor) else found.to_dense()
        return NMF(dense, eye) if n <= m else NMF(eye, dense)
    work, scale = scaled_to_unit(wide.contiguous() if isinstance(wide, Tensor) else wide)
    w, h = _start(work, rank, init, seed)
    if sweeps and bool(w.any()):
        data = products_of(work)
        problem = Divergence(data) if loss == "kl" else LeastSquares(data, solver)
        w, h = _descend(problem, w, h, stopping)
    return _tidy(w, h, scale, found.dtype)


def _start(matrix: Tensor | SparseMatrix, rank: int, init: Init, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the start ``W^T [r, m]`` and ``H [r, n]``: components are rows, so that each is contiguous."""
    m, n = matrix.shape
    entries = matrix if isinstance(matrix, Tensor) else matrix.values
    mean = float(entries.sum(dtype=torch.float64)) / (m * n)
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(rank, m + n, generator=generator, dtype=torch.float64)
        both = (normal.abs() * math.sqrt(mean / rank)).to(entries)
        return both[:, :m].contiguous(), both[:, m:].contiguous()
    if min(m, n) > 256 and rank < min(m, n) // 4:
        u, s, vh = randomized_svd(matrix, rank, power_iterations=2, seed=seed)
    elif isinstance(matrix, SparseMatrix):
        u, s, vh = gram_svd(matrix, rank)
    else:
        triplets = svd(matrix, rank)
        u, s, vh = triplets.u, triplets.s, triplets.vh
    w, h = _nndsvd(u.mT, s, vh)
    if init == "nndsvda":
        w, h = (torch.where(factor > 1e-6, factor, mean) for factor in (w, h))
    return w, h


def _nndsvd(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the larger of the two non-negative parts of each ``s u v^T``, ``s u+ v+^T`` and ``s u- v-^T``."""
    parts = []
    for sign in (1, -1):
        u, v = (sign * left).clamp_min(0), (sign * right).clamp_min(0)
        parts.append((u, v, torch.linalg.vector_norm(u, dim=1), torch.linalg.vector_norm(v, dim=1)))
    (u, v, a, b), (u_minus, v_minus, c, d) = parts
    plus = a * b > c * d
    # by Perron and Frobenius the leading pair has one sign, up to rounding
    plus[0] = a[0] > c[0]
    u, v = torch.where(plus[:, None], u, u_minus), torch.where(plus[:, None], v, v_minus)
    a, b = torch.where(plus, a, c), torch.where(plus, b, d)
    least = torch.finfo(values.dtype).tiny
    size = (values * a * b).sqrt()
    return u * (size / a.clamp_min(least))[:, None], v * (size / b.clamp_min(least))[:, None]


def _descend(problem: Problem, w: Tensor, h: Tensor, stopping: Stopping) -> tuple[Tensor, Tensor]:
    """Iterates with Ang and Gillis' extrapolation (2019, algorithm 3), or plain steps where that does not pay."""
    objective = mark = problem.objective(w, h)
    ahead, most = 0.5, 2.0
    for sweep in range(1, stopping.sweeps + 1):
        before = w.clone(), h.clone()
        problem.step(w, h)
        further = [
            torch.maximum(torch.lerp(old, new, 1 + ahead), problem.floor * new)
            for old, new in zip(before, (w, h), strict=True)
        ]
        reached = problem.objective(*further)
        if reached <= objective:
            w, h = further
            ahead, most = min(most, 1.05 * ahead), min(2.0, 1.01 * most)
        else:
            reached = problem.objective(w, h)
            ahead, most = ahead / 1.5, ahead
        objective = reached
        if sweep % 10 == 0:
            if mark - objective <= stopping.tolerance * objective:
                break
            mark = objective
    return w, h


def _tidy(w: Tensor, h: Tensor, scale: float, dtype: torch.dtype) -> NMF:
    """Sorts the components, largest first, and balances the norms of their two sides."""
    zero = 2 * smallest(w)
    w, h = (torch.where(factor > zero, factor, 0.0) for factor in (w, h))
    a, b = torch.linalg.vector_norm(w, dim=1), torch.linalg.vector_norm(h, dim=1)
    size, order = (a * b).sort(descending=True, stable=True)
    root, least = size.sqrt() * math.sqrt(scale), tiny(w)
    w = w[order] * (root / a[order].clamp_min(least))[:, None]
    h = h[order] * (root / b[order].clamp_min(least))[:, None]
    return NMF(w.mT.to(dtype).contiguous(), h.to(dtype).contiguous())
