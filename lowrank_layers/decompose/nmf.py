"""Non-negative matrix factorization."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..errors import LowRankError
from ..factors import NMF
from ..linalg import check_tensor, randomized_svd, scaled_to_unit, working_dtype
from ..rank import Rank
from .ranks import matrix_rank
from .svd import svd

Solver = Literal["hals", "mu"]
Loss = Literal["frobenius", "kl"]
Init = Literal["nndsvda", "nndsvd", "random"]


def nmf(
    matrix: Tensor,
    rank: Rank,
    *,
    solver: Solver = "hals",
    loss: Loss = "frobenius",
    init: Init = "nndsvda",
    sweeps: int = 200,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> NMF:
    r"""Two non-negative factors of a non-negative matrix: ``X`` is nearly ``W H``.

    Every sweep updates ``W``, then ``H``, and moves on in the direction of the step (Ang and Gillis, 2019); where that
    does not lower the objective, the plain step, which always does, stands. So no sweep makes the objective grow.

    Args:
        matrix: any float dtype, any device, no entry below zero; half precision is computed in fp32 and cast back.
            Gradients do not flow: the input is detached. Where nine tenths of it are zero, the zeros cost nothing.
        rank: number of components; above ``min(m, n)`` it is clamped. At that rank the result is exact: the matrix
            itself and the identity. A rule looks at the singular values of the matrix, whose tail is the least error of
            any factorization of that rank: that of non-negative factors may be larger than the rule asked for.
        solver: ``"hals"``, exact minimisation over one component after the other (Cichocki and Phan, 2009), or
            ``"mu"``, multiplicative updates (Lee and Seung, 2001), slower to converge and the only one for ``"kl"``.
            Both use a product with the matrix several times where that is cheap (Gillis and Glineur, 2012).
        loss: ``"frobenius"``, ``||X - W H||^2 / 2``, or ``"kl"``, the generalised Kullback-Leibler divergence
            ``sum X log(X / W H) - X + W H``, which suits counts.
        init: ``"nndsvd"`` (Boutsidis and Gallopoulos, 2008), the non-negative parts of the singular vectors;
            ``"nndsvda"``, the same with the mean of the matrix (scaled to a largest entry between 1 and 2) in place
            of zeros, or ``"random"``. Multiplicative updates leave a zero only slowly: give them one of the last two.
        sweeps: at most this many; 0 returns the start.
        tolerance: stops when the objective ``D`` fell by too little in ten sweeps:
            ``D[t - 10] - D[t] <= tolerance * D[t]``.
        seed: of the random start, and of the randomized SVD of a large matrix; the global generator is left alone.

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
    matrix = check_tensor(matrix, "nmf", ndim=2)
    _check_arguments(solver, loss, init, sweeps, tolerance)
    work = matrix.to(working_dtype(matrix))
    smallest, largest = (float(bound) for bound in torch.aminmax(work))
    if smallest < 0:
        raise LowRankError(
            f"nmf: got a negative entry ({smallest:.4g}), expected a matrix without; shift it, clip it with"
            " .clamp_min(0), or use svd."
        )
    m, n = matrix.shape
    rank = matrix_rank(rank, work, "nmf")
    if rank == min(m, n):
        eye = torch.eye(min(m, n), dtype=matrix.dtype, device=matrix.device)
        dense = matrix.clone(memory_format=torch.contiguous_format)
        return NMF(dense, eye) if n <= m else NMF(eye, dense)
    work, scale = scaled_to_unit(work.contiguous())
    w, h = _start(work, rank, init, seed)
    if sweeps and largest > 0:
        data = _Sparse(work) if _mostly_zero(work) else _Dense(work)
        problem = _Divergence(data) if loss == "kl" else _LeastSquares(data, solver)
        w, h = _descend(problem, w, h, sweeps, tolerance)
    return _tidy(w, h, scale, matrix.dtype)


# ------------------------------------------------------------------------------------------------------- the start


def _start(matrix: Tensor, rank: int, init: Init, seed: int) -> tuple[Tensor, Tensor]:
    """``W^T [r, m]`` and ``H [r, n]``: components are rows everywhere here, so that each lies in one piece."""
    m, n = matrix.shape
    mean = float(matrix.mean(dtype=torch.float64))
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(rank, m + n, generator=generator, dtype=torch.float64)
        both = (normal.abs() * math.sqrt(mean / rank)).to(matrix)
        return both[:, :m].contiguous(), both[:, m:].contiguous()
    if min(m, n) > 256 and rank < min(m, n) // 4:
        u, s, vh = randomized_svd(matrix, rank, power_iterations=2, seed=seed)
    else:
        triplets = svd(matrix, rank)
        u, s, vh = triplets.u, triplets.s, triplets.vh
    w, h = _nndsvd(u.mT, s, vh)
    if init == "nndsvda":
        w, h = (torch.where(factor > 1e-6, factor, mean) for factor in (w, h))
    return w, h


def _nndsvd(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of every ``s u v^T`` the larger of the two non-negative parts, ``s u+ v+^T`` and ``s u- v-^T``."""
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
    tiny = torch.finfo(values.dtype).tiny
    size = (values * a * b).sqrt()
    return u * (size / a.clamp_min(tiny))[:, None], v * (size / b.clamp_min(tiny))[:, None]


# --------------------------------------------------------------------------------------------- matrix and products


class _Dense:
    """The matrix, and the products with it that the updates need."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.nnz = matrix.numel()
        # the quotients of one chunk are all that is ever stored of them
        step = max(1, (2**20 if matrix.device.type == "cpu" else 2**26) // matrix.shape[1])
        self.chunks = [slice(start, start + step) for start in range(0, len(matrix), step)]

    def left(self, w: Tensor) -> Tensor:
        """``W^T X``."""
        return w @ self.matrix

    def right(self, h: Tensor) -> Tensor:
        """``H X^T``."""
        return h @ self.matrix.mT

    def quotient_left(self, w: Tensor, h: Tensor) -> Tensor:
        """``W^T (X / W H)``."""
        product = torch.zeros_like(h)
        for rows, _, quotient in self._quotients(w, h):
            product.addmm_(w[:, rows], quotient)
        return product

    def quotient_right(self, w: Tensor, h: Tensor) -> tuple[Tensor, float]:
        """``H (X / W H)^T``, and ``sum X log(X / W H)``."""
        products, logs = [], []
        for _, part, quotient in self._quotients(w, h):
            products.append(h @ quotient.mT)
            logs.append(quotient.clamp_min_(_tiny(quotient)).log_().mul_(part).sum().double())
        return torch.cat(products, dim=1), float(torch.stack(logs).sum())

    def _quotients(self, w: Tensor, h: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        buffer = torch.empty_like(self.matrix[self.chunks[0]])
        for rows in self.chunks:
            part = self.matrix[rows]
            quotient = torch.mm(w[:, rows].mT, h, out=buffer[: len(part)])
            yield rows, part, torch.div(part, quotient.clamp_min_(_tiny(quotient)), out=quotient)


class _Sparse:
    """The same for a matrix of mostly zeros, in compressed rows and in compressed columns."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this layout announces itself as beta
            self.rows, self.columns = matrix.to_sparse_csr(), matrix.mT.contiguous().to_sparse_csr()
            self.row_quotients, self.column_quotients = self.rows.clone(), self.columns.clone()
        self.nnz = self.rows.values().numel()

    def left(self, w: Tensor) -> Tensor:
        """``W^T X``."""
        return _times(self.columns, w)

    def right(self, h: Tensor) -> Tensor:
        """``H X^T``."""
        return _times(self.rows, h)

    def quotient_left(self, w: Tensor, h: Tensor) -> Tensor:
        """``W^T (X / W H)``."""
        return _times(_quotients(self.columns, h, w, self.column_quotients), w)

    def quotient_right(self, w: Tensor, h: Tensor) -> tuple[Tensor, float]:
        """``H (X / W H)^T``, and ``sum X log(X / W H)``."""
        quotients = _quotients(self.rows, w, h, self.row_quotients)
        log = quotients.values().log().mul_(self.rows.values()).sum(dtype=torch.float64)
        return _times(quotients, h), float(log)


def _times(sparse: Tensor, factor: Tensor) -> Tensor:
    """``factor @ sparse^T`` from row-major operands, which the sparse product is fastest on."""
    product: Tensor = sparse @ factor.mT.contiguous()
    return product.mT.contiguous()


def _quotients(sparse: Tensor, own: Tensor, other: Tensor, out: Tensor) -> Tensor:
    """``sparse / own^T other`` where ``sparse`` has entries."""
    torch.sparse.sampled_addmm(sparse, own.mT.contiguous(), other.mT.contiguous().mT, beta=0.0, out=out)
    model = out.values()
    torch.div(sparse.values(), model.clamp_min_(_tiny(model)), out=model)
    return out


def _mostly_zero(matrix: Tensor) -> bool:
    sparse_kernels = matrix.is_cuda or (matrix.device.type == "cpu" and torch.backends.mkl.is_available())
    return sparse_kernels and matrix.numel() > 2**16 and int(torch.count_nonzero(matrix)) < 0.1 * matrix.numel()


def _tiny(tensor: Tensor) -> float:
    """What stands in for a zero below a fraction bar: its reciprocal is still finite, and so is that one's square."""
    return float(torch.finfo(tensor.dtype).tiny ** 0.5)


# ------------------------------------------------------------------------------------------------------ the sweeps


class _Problem(Protocol):
    floor: float

    def objective(self, w: Tensor, h: Tensor) -> float:
        """At these factors; keeps the products that a step from here begins with."""

    def step(self, w: Tensor, h: Tensor) -> None:
        """In place, from where the objective was computed last; never makes it grow."""


class _LeastSquares:
    def __init__(self, data: _Dense | _Sparse, solver: Solver) -> None:
        self.data = data
        self.update = _hals if solver == "hals" else _multiply
        self.floor = 0.0 if solver == "hals" else 0.1
        self.energy = float(torch.linalg.vector_norm(data.matrix, dtype=torch.float64)) ** 2

    def objective(self, w: Tensor, h: Tensor) -> float:
        """``||X - W H||^2 = ||X||^2 - 2 <H X^T, W^T> + <W^T W, H H^T>``."""
        self.product, self.gram = self.data.right(h), h @ h.mT
        inner = (self.product * w).sum(dtype=torch.float64)
        model = (self.gram * (w @ w.mT)).sum(dtype=torch.float64)
        return max(self.energy + float(model - 2 * inner), 0.0) / 2

    def step(self, w: Tensor, h: Tensor) -> None:
        self.update(w, self.gram, self.product, self._inner(w))
        self.update(h, w @ w.mT, self.data.left(w), self._inner(h))

    def _inner(self, factor: Tensor) -> int:
        """Updates from one product with the matrix: as many as cost about as much as it, at most four."""
        rank, length = factor.shape
        return 1 + min(3, self.data.nnz // (length * rank))


def _hals(factor: Tensor, gram: Tensor, product: Tensor, inner: int) -> None:
    """``f_k = max(0, (p_k - sum_{j != k} g_kj f_j) / g_kk)``, one row ``k`` after the other."""
    diagonal = gram.diagonal()
    alive = diagonal > torch.finfo(gram.dtype).eps ** 2 * diagonal.max()
    inverse = torch.where(alive, 1 / diagonal, 0.0)[:, None]
    gram, product = gram * inverse, product * inverse
    # where the other factor vanishes, anything is optimal: -1 leaves the row as it is
    gram.diagonal().copy_(torch.where(alive, 0.0, -1.0))
    rows = list(zip(factor.unbind(), product.unbind(), gram.unbind(), strict=True))
    columns, target = factor.mT, torch.empty_like(factor[0])
    for _ in range(inner):
        for row, p, g in rows:
            torch.addmv(p, columns, g, alpha=-1, out=target)
            torch.clamp_min(target, 0, out=row)


def _multiply(factor: Tensor, gram: Tensor, product: Tensor, inner: int) -> None:
    """``F *= P / G F``."""
    buffer = torch.empty_like(factor)
    for _ in range(inner):
        torch.mm(gram, factor, out=buffer)
        torch.div(product, buffer.clamp_min_(_tiny(buffer)), out=buffer)
        factor.mul_(buffer).clamp_min_(_zero(factor))


class _Divergence:
    floor = 0.1

    def __init__(self, data: _Dense | _Sparse) -> None:
        self.data = data
        self.total = float(data.matrix.sum(dtype=torch.float64))

    def objective(self, w: Tensor, h: Tensor) -> float:
        self.product, log = self.data.quotient_right(w, h)
        model = w.sum(1, dtype=torch.float64) @ h.sum(1, dtype=torch.float64)
        return log - self.total + float(model)

    def step(self, w: Tensor, h: Tensor) -> None:
        self._multiply(w, self.product, h)
        self._multiply(h, self.data.quotient_left(w, h), w)

    @staticmethod
    def _multiply(factor: Tensor, product: Tensor, other: Tensor) -> None:
        factor.mul_(product).div_(other.sum(1, keepdim=True).clamp_min_(_tiny(other))).clamp_min_(_zero(factor))


def _zero(factor: Tensor) -> float:
    """What multiplicative updates treat as zero: an entry at exactly zero could never leave it, a denormal is slow."""
    return float(torch.finfo(factor.dtype).eps ** 2)


def _descend(problem: _Problem, w: Tensor, h: Tensor, sweeps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Ang and Gillis' extrapolation (2019, algorithm 3), with the plain step wherever it does not pay."""
    objective = mark = problem.objective(w, h)
    ahead, most = 0.5, 2.0
    for sweep in range(1, sweeps + 1):
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
            if mark - objective <= tolerance * objective:
                break
            mark = objective
    return w, h


def _tidy(w: Tensor, h: Tensor, scale: float, dtype: torch.dtype) -> NMF:
    """The largest component first, both sides of each of one norm."""
    zero = 2 * _zero(w)
    w, h = (torch.where(factor > zero, factor, 0.0) for factor in (w, h))
    a, b = torch.linalg.vector_norm(w, dim=1), torch.linalg.vector_norm(h, dim=1)
    size, order = (a * b).sort(descending=True, stable=True)
    root, tiny = size.sqrt() * math.sqrt(scale), _tiny(w)
    w = w[order] * (root / a[order].clamp_min(tiny))[:, None]
    h = h[order] * (root / b[order].clamp_min(tiny))[:, None]
    return NMF(w.mT.to(dtype).contiguous(), h.to(dtype).contiguous())


def _check_arguments(solver: str, loss: str, init: str, sweeps: int, tolerance: float) -> None:
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise LowRankError(f"nmf: got sweeps {sweeps!r}, expected an integer of at least 0.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise LowRankError(f"nmf: got tolerance {tolerance!r}, expected a number of at least 0.")
    for name, choice, known in (
        ("solver", solver, get_args(Solver)),
        ("loss", loss, get_args(Loss)),
        ("init", init, get_args(Init)),
    ):
        if choice not in known:
            *others, last = map(repr, known)
            raise LowRankError(f"nmf: got {name} {choice!r}, expected {', '.join(others)} or {last}.")
    if loss == "kl" and solver == "hals":
        raise LowRankError(
            "nmf: got solver 'hals' with loss 'kl', expected solver 'mu': HALS solves least squares only."
        )
