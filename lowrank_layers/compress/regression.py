r"""The weighted reduced-rank regression that every method solves.

For small changes the loss grows by half the quadratic form of its curvature. With the Kronecker approximation of the
curvature (Martens and Grosse, 2015) one layer contributes

.. math:: \Delta L \approx \tfrac12 P \, E \| G^{1/2} (W x - \hat W x') \|^2,  X = E[x x^T],  G = E[g g^T]

with ``x`` the dense model's inputs (a convolution's patches), ``x'`` those that the compressed prefix delivers, ``g``
the loss's gradient at the output and ``P`` positions per sample. Both are centred, which costs nothing but the bias.
The best map without a limit is ``F = W E[x x'^T] E[x' x'^T]^(-1)``; the best one of rank ``r`` is the truncated SVD
of ``M = G^(1/2) F E[x' x'^T]^(1/2)``, and the discarded squared singular values are in units of loss. With ``G = I``
it is activation whitening, with ``X = I`` too it is plain SVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..calibrate.layer_stats import LayerStats
from ..calibrate.readable import own_copy
from ..calibrate.sketch import diagonal_plus_low_rank
from ..linalg import LowRankRoot, Root, exact_svd, leading_svd, low_rank_root, psd_root
from .damping import Damping

_COLUMNS = 8192
"""How many rows of an embedding are compared at once."""


@dataclass(frozen=True)
class Metric:
    """A quadratic form that weights errors, and its root, computed when it is first asked for.

    Args:
        matrix: symmetric and positive definite, ``[n, n]``, or the diagonal of such a matrix, ``[n]``; in fp64.
        factor: ``F [n, k]``, of which ``F F^T`` is added to a diagonal; ``None`` for nothing.
    """

    matrix: Tensor
    factor: Tensor | None = None

    @classmethod
    def identity(cls, n: int, device: torch.device) -> Metric:
        """The form that weights everything alike."""
        return cls(torch.ones(n, dtype=torch.float64, device=device))

    @classmethod
    def of_gradients(cls, moment: Tensor, damping: Damping) -> Metric:
        """The form of a second moment of gradients, or of a sketch of it, damped.

        Args:
            moment: ``[n, n]``, or what a :class:`GradientSketch` took; it is changed.
            damping: the ridge on it, and how far it is shrunk towards its diagonal.
        """
        if moment.ndim == 2 and moment.shape[0] != moment.shape[1]:
            whole, left = moment[:, 0].double(), 1 - damping.output_shrinkage
            diagonal, factor = diagonal_plus_low_rank(moment)
            diagonal = left * diagonal + damping.output_shrinkage * whole
            return cls(diagonal + damping.outputs * whole.mean(), left**0.5 * factor)
        ridge = damping.outputs * diagonal_of(moment).mean()
        return cls(add_ridge_(to_diagonal_(moment, damping.output_shrinkage), ridge))

    @classmethod
    def of_outputs(cls, stats: LayerStats, damping: Damping, device: torch.device) -> Metric | None:
        """The form of one group's gradients in statistics; ``None`` where they are unknown, or all zero.

        Args:
            stats: the statistics.
            damping: the ridge on them, and how far they are shrunk towards their diagonal.
            device: where it is computed.
        """
        if vars(stats)["gradients"] is None:
            return None
        moment = own_copy(stats, "gradients").to(device)
        if not bool(moment.count_nonzero()):
            return None
        return cls.of_gradients(moment, damping)

    @cached_property
    def root(self) -> Root | LowRankRoot:
        """``L`` with ``L^T L`` the matrix."""
        return psd_root(self.matrix) if self.factor is None else low_rank_root(self.matrix, self.factor)

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the matrix, ``[n]``."""
        return diagonal_of(self.matrix) if self.factor is None else self.matrix + self.factor.square().sum(1)

    def times(self, columns: Tensor) -> Tensor:
        """``A columns``, in the dtype of the columns."""
        matrix = self.matrix.to(columns)
        product: Tensor = matrix[:, None] * columns if matrix.ndim == 1 else matrix @ columns
        if self.factor is None:
            return product
        factor = self.factor.to(columns)
        return product + factor @ (factor.mT @ columns)

    def gram(self, columns: Tensor) -> Tensor:
        """``columns^T A columns``, without the root."""
        return columns.mT @ self.times(columns)


@dataclass(frozen=True)
class Regression:
    """Find ``A`` with few parameters such that ``A (x' - E x') + E y`` is close to ``y = W x + b``.

    Args:
        weight: ``W``, ``[m, n]``, in fp64.
        bias: ``b``, ``[m]`` or ``None``.
        outputs: ``G``, damped, over the ``m`` outputs.
        inputs: centred ``E[x' x'^T]``, damped, over the ``n`` inputs.
        moved: ``W`` times the centred ``E[x x'^T]``, damped likewise, ``[m, n]``; ``None`` where ``x' = x``.
        mean: ``E[x']``; ``None`` where nothing is known or the map goes through the origin.
        target_mean: ``E[x]``, likewise.
        scale: positions per sample.
    """

    weight: Tensor
    bias: Tensor | None
    outputs: Metric
    inputs: Metric
    moved: Tensor | None = None
    mean: Tensor | None = None
    target_mean: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def plain(cls, weight: Tensor, bias: Tensor | None) -> Regression:
        """The problem where nothing is known of inputs and outputs: the approximation of the weight itself."""
        rows, columns = weight.shape
        return cls(weight, bias, Metric.identity(rows, weight.device), Metric.identity(columns, weight.device))

    @cached_property
    def full(self) -> Tensor:
        """``F``, the best map without a limit on the rank, ``[m, n]``."""
        return self.weight if self.moved is None else self.inputs.root.solve(self.moved.mT).mT

    @cached_property
    def matrix(self) -> Tensor:
        """``M``, whose squared singular values are the captured loss, ``[m, n]``."""
        root = self.inputs.root
        if self.moved is None:
            return self.outputs.root.times(root.times(self.weight.mT).mT)
        # F X^(1/2)^T = W C X^-1 L^T = W C L^-1, with L^T L = X
        return self.outputs.root.times(root.divide_columns(self.moved))

    @property
    def symmetric_matrix(self) -> Tensor:
        """``M`` by the symmetric roots of both moments, whose rows and columns are outputs and inputs, ``[m, n]``.

        A triangular root gathers what it weights in its first rows, so that single entries cannot be predicted.
        """
        return _to_symmetric(self.outputs.root, _to_symmetric(self.inputs.root, self.matrix.mT).mT)

    @cached_property
    def _gram(self) -> Tensor:
        """``M M^T`` or ``M^T M``, whichever is smaller, with no more roots than it needs."""
        wide = self.weight.shape[0] <= self.weight.shape[1]
        if self.moved is not None:
            return self.matrix @ self.matrix.mT if wide else self.matrix.mT @ self.matrix
        if wide:
            inner, root = self.inputs.gram(self.weight.mT), self.outputs.root
        else:
            inner, root = self.outputs.gram(self.weight), self.inputs.root
        return root.times(root.times(inner).mT)

    @cached_property
    def energy(self) -> float:
        """The loss of leaving only the mean: ``1/2 P E ||G^(1/2) F (x' - E x')||^2``."""
        captured = self._gram.trace() if self.moved is None else self.matrix.square().sum()
        return 0.5 * self.scale * float(captured)

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values of ``M``, largest first, ``[min(m, n)]``."""
        values: Tensor = torch.linalg.eigvalsh(self._gram)
        return values.flip(0).clamp_min(0).sqrt()

    @property
    def tails(self) -> Tensor:
        """Loss increase at rank 0, 1, 2, ..., ``[min(m, n) + 1]``."""
        captured = self.singular_values.square()
        tails = torch.cat([captured, captured.new_zeros(1)]).flip(0).cumsum(0).flip(0)
        return 0.5 * self.scale * tails

    def loss(self, matrix: Tensor) -> float:
        """Loss increase of any map, low-rank or not: ``1/2 P ||G^(1/2) (F - matrix) X^(1/2)||^2``.

        Shape:
            ``[m, n]``.
        """
        outputs, inputs = self.outputs.root, self.inputs
        if inputs.matrix.ndim > 1:
            error = outputs.times(inputs.root.times((self.full - matrix.double()).mT).mT)
            return 0.5 * self.scale * float(error.square().sum())
        total = 0.0
        for start in range(0, self.full.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            error = outputs.times(self.full[:, part] - matrix[:, part].double())
            total += float(error.square().sum(0) @ inputs.matrix[part])
        return 0.5 * self.scale * total

    def loss_of_pair(self, up: Tensor, down: Tensor) -> float:
        """:meth:`loss` of a product of two factors, for less work, and in fp32, in which errors that small are exact.

        Shape:
            ``[m, r]`` and ``[r, n]``.
        """
        left = self.outputs.root.times(up.double()).float()
        right = self.inputs.root.times(down.double().mT).mT.float()
        error = torch.addmm(self.matrix.float(), left, right, alpha=-1)
        return 0.5 * self.scale * float(error.square().sum(dtype=torch.float64))

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """``up [m, r]`` and ``down [r, n]`` of the best map of that rank, balanced."""
        u, s, vh = leading_svd(self.matrix, rank)
        root = s.sqrt()
        return self.outputs.root.divide(u * root), self.inputs.root.divide(vh.mT * root).mT

    def corrected_bias(self, product: Tensor) -> Tensor | None:
        """``b + W E[x] - A E[x']``, with ``A`` the map that was found."""
        if self.mean is None or self.target_mean is None:
            return self.bias
        shift = self.weight @ self.target_mean - product @ self.mean
        return shift if self.bias is None else self.bias + shift

    def after(self, stage: FirstStage) -> Regression:
        """The problem that is left once the inputs pass a fixed first stage.

        The target stays ``W x``: its weight is kept, and only ``x'`` is replaced by ``stage @ x'``.
        """
        moment = self.inputs.matrix
        if moment.ndim == 1:
            half = stage.dense() * moment
            reduced = stage.times(half.mT)
            moved = self.weight @ half.mT
        else:
            half = stage.times(moment)
            reduced = stage.times(half.mT)
            moved = self.weight @ half.mT if self.moved is None else stage.times(self.moved.mT).mT
        floor = 1e-10 * reduced.diagonal().mean()
        mean = None if self.mean is None else stage.times(self.mean[:, None])[:, 0]
        return replace(self, inputs=Metric(add_ridge_(reduced, floor)), moved=moved, mean=mean)


@dataclass(frozen=True)
class FirstStage:
    """A fixed linear map that runs at several positions of a patch: ``factor (x) I``, which is never formed.

    Args:
        factor: ``[r, n]``.
        positions: number of positions; the patch has ``n * positions`` entries, positions fastest.
    """

    factor: Tensor
    positions: int = 1

    def times(self, matrix: Tensor) -> Tensor:
        """``stage @ matrix``, ``[n * positions, m]`` to ``[r * positions, m]``."""
        rows = self.factor @ matrix.reshape(self.factor.shape[1], -1)
        return rows.reshape(-1, matrix.shape[1])

    def dense(self) -> Tensor:
        """The matrix ``[r * positions, n * positions]``."""
        eye = torch.eye(self.positions, dtype=self.factor.dtype, device=self.factor.device)
        return torch.kron(self.factor.contiguous(), eye)


def _to_symmetric(root: Root | LowRankRoot, product: Tensor) -> Tensor:
    """``S A`` from ``L A``, with ``L = U S`` the polar decomposition of the root; a diagonal root is symmetric."""
    factor = root.times(torch.diag(torch.ones_like(root.scale))) if isinstance(root, LowRankRoot) else root.factor
    if factor.ndim == 1:
        return product
    u, _, vh = exact_svd(factor)
    return vh.mT @ (u.mT @ product)


def joint_bias(problems: Sequence[Regression], products: Sequence[Tensor]) -> Tensor | None:
    """:meth:`Regression.corrected_bias` of all groups, one after the other."""
    pairs = zip(problems, products, strict=True)
    parts = [bias for bias in (problem.corrected_bias(product) for problem, product in pairs) if bias is not None]
    return torch.cat(parts) if parts else None


def add_ridge_(moment: Tensor, ridge: Tensor) -> Tensor:
    """Adds ``ridge * I`` to a matrix or a diagonal, in place, and returns it."""
    diagonal_of(moment).add_(ridge)
    return moment


def to_diagonal_(moment: Tensor, share: float) -> Tensor:
    """Shrinks a moment towards its diagonal, which stays as it is, in place, and returns it."""
    if share and moment.ndim == 2:
        diagonal = moment.diagonal().clone()
        moment.mul_(1 - share).diagonal().copy_(diagonal)
    return moment


def diagonal_of(moment: Tensor) -> Tensor:
    """The diagonal of a matrix, which may be stored as its diagonal alone."""
    return moment if moment.ndim == 1 else moment.diagonal()
