r"""The weighted reduced-rank regression that every method solves.

For small changes the loss grows by half the quadratic form of its curvature; with the Kronecker approximation of that
(Martens and Grosse, 2015) one layer contributes

.. math:: \Delta L \approx \tfrac12 P \, E \| G^{1/2} (W x - \hat W x') \|^2,  X = E[x x^T],  G = E[g g^T]

with ``x`` the dense model's inputs (a convolution's patches), ``x'`` those that the compressed prefix delivers, ``g``
the loss's gradient at the output and ``P`` positions a sample. Both are centred, which costs nothing but the bias.
The best map without a limit is ``F = W E[x x'^T] E[x' x'^T]^(-1)``; the best one of rank ``r`` is the truncated SVD
of ``M = G^(1/2) F E[x' x'^T]^(1/2)``, and the discarded squared singular values are in units of loss. With ``G = I``
it is activation whitening, with ``X = I`` too it is plain SVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStats
from ...errors import LowRankError
from ...layers import bias_of, matrices_of, takes_bias
from ...linalg import Root, damp, exact_svd, gram_svd, psd_root

INPUT_DAMPING = 1e-3
"""Ridge on the inputs, relative to their mean variance; it pulls towards the dense weight."""
OUTPUT_DAMPING = 0.1
"""Ridge on the gradients, relative to their mean: outputs that this sample found unimportant keep some weight."""

_COLUMNS = 8192
"""How many rows of a table are compared at once."""


@dataclass(frozen=True)
class Regression:
    """Find ``A`` with few parameters such that ``A (x' - E x') + E y`` is close to ``y = W x + b``.

    Args:
        weight: ``W``, ``[m, n]``, in fp64.
        bias: ``b``, ``[m]`` or ``None``.
        output: root of ``G``.
        moment: centred ``E[x' x'^T]``, damped, ``[n, n]`` (``[n]``: diagonal).
        cross: centred ``E[x x'^T]``, damped likewise, ``[n, n]``; ``None`` where ``x' = x``.
        mean: ``E[x']``; ``None`` where nothing is known.
        target_mean: ``E[x]``.
        scale: positions a sample.
    """

    weight: Tensor
    bias: Tensor | None
    output: Root
    moment: Tensor
    cross: Tensor | None
    mean: Tensor | None
    target_mean: Tensor | None
    scale: float

    @classmethod
    def of(cls, matrix: Tensor, bias: Tensor | None, stats: LayerStats | None, *, centred: bool) -> Regression:
        """The problem of one matrix; without statistics the plain approximation of it.

        Args:
            matrix: the weight, ``[out, in]``.
            bias: ``[out]`` or ``None``.
            stats: the statistics of its inputs and outputs.
            centred: with the bias free; otherwise the map goes through the origin.
        """
        weight = matrix.double()
        bias = None if bias is None else bias.detach().double()
        rows, columns = weight.shape
        if stats is None:
            eye = torch.ones(columns, dtype=torch.float64, device=weight.device)
            return cls(weight, bias, _identity(rows, weight), eye, None, None, None, 1.0)
        if len(stats.inputs.mean) != columns:
            raise LowRankError(
                f"got statistics of {len(stats.inputs.mean)} inputs for a layer of {columns};"
                " calibrate this model, not another one."
            )
        mean = stats.inputs.mean.to(weight.device)
        target = mean if stats.target_mean is None else stats.target_mean.to(weight.device)
        moment = stats.inputs.covariance().to(weight.device)
        cross = None if stats.cross is None else stats.cross.to(weight.device)
        if not centred and moment.ndim > 1:
            moment = moment + torch.outer(mean, mean)
            cross = None if cross is None else cross + torch.outer(target, mean)
        ridge = INPUT_DAMPING * (moment.mean() if moment.ndim == 1 else moment.diagonal().mean())
        ridge = ridge if ridge > 0 else torch.ones_like(ridge)
        output = _identity(rows, weight)
        if stats.gradients is not None:
            output = psd_root(damp(stats.gradients.to(weight.device), OUTPUT_DAMPING))
        return cls(
            weight,
            bias,
            output,
            _add_ridge(moment, ridge),
            None if cross is None else _add_ridge(cross, ridge),
            mean if centred else None,
            target if centred else None,
            stats.positions,
        )

    @cached_property
    def _input(self) -> Root:
        return psd_root(self.moment)

    @cached_property
    def full(self) -> Tensor:
        """``F``, the best map without a limit on the rank, ``[m, n]``."""
        return self.weight if self.cross is None else self._input.solve((self.weight @ self.cross).mT).mT

    @cached_property
    def matrix(self) -> Tensor:
        """``M``, whose squared singular values are the captured loss, ``[m, n]``."""
        return self.output.times(self._input.times(self.full.mT).mT)

    @cached_property
    def energy(self) -> float:
        """The loss of leaving only the mean: ``1/2 P E ||G^(1/2) F (x' - E x')||^2``."""
        return 0.5 * self.scale * float(self.matrix.square().sum())

    def tails(self) -> Tensor:
        """Loss increase at rank 0, 1, 2, ..., ``[min(m, n) + 1]``."""
        captured = self.singular_values().square()
        tails = torch.cat([captured, captured.new_zeros(1)]).flip(0).cumsum(0).flip(0)
        return 0.5 * self.scale * tails

    def loss(self, matrix: Tensor) -> float:
        """Loss increase of any map, low-rank or not: ``1/2 P ||G^(1/2) (F - matrix) X^(1/2)||^2``.

        Shape:
            ``[m, n]``.
        """
        if self.moment.ndim > 1:
            error = self.output.times(self._input.times((self.full - matrix.double()).mT).mT)
            return 0.5 * self.scale * float(error.square().sum())
        total = 0.0
        for start in range(0, self.full.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            error = self.output.times(self.full[:, part] - matrix[:, part].double())
            total += float(error.square().sum(0) @ self.moment[part])
        return 0.5 * self.scale * total

    def singular_values(self) -> Tensor:
        """Of ``M``, largest first."""
        m = self.matrix
        gram = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
        values: Tensor = torch.linalg.eigvalsh(gram)
        return values.flip(0).clamp_min(0).sqrt()

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """``up [m, r]`` and ``down [r, n]`` of the best map of that rank, balanced."""
        rows, columns = self.matrix.shape
        long = max(rows, columns) >= 4 * min(rows, columns)
        u, s, vh = gram_svd(self.matrix, rank) if long else exact_svd(self.matrix)
        root = s[:rank].sqrt()
        return self.output.divide(u[:, :rank] * root), self._input.divide(vh[:rank].mT * root).mT

    def corrected_bias(self, product: Tensor) -> Tensor | None:
        """``b + W E[x] - A E[x']``, with ``A`` the map that was found."""
        if self.mean is None or self.target_mean is None:
            return self.bias
        shift = self.weight @ self.target_mean - product @ self.mean
        return shift if self.bias is None else self.bias + shift

    def after(self, front: Front) -> Regression:
        """The problem that is left once the inputs pass a fixed front end first.

        The target stays ``W x``: its weight is kept, and only ``x'`` is replaced by ``front @ x'``.
        """
        if self.moment.ndim == 1:
            half = front.dense() * self.moment
            moment = front.times(half.mT)
            cross = half.mT
        else:
            moment = front.times(front.times(self.moment).mT)
            cross = front.times((self.moment if self.cross is None else self.cross).mT).mT
        floor = 1e-10 * moment.diagonal().mean()
        mean = None if self.mean is None else front.times(self.mean[:, None])[:, 0]
        return replace(self, moment=_add_ridge(moment, floor), cross=cross, mean=mean)


@dataclass(frozen=True)
class Front:
    """A fixed first stage that runs at several positions of a patch: ``factor (x) I``, which is never formed.

    Args:
        factor: ``[r, n]``.
        positions: how many of them; the patch has ``n * positions`` entries, positions fastest.
    """

    factor: Tensor
    positions: int = 1

    def times(self, matrix: Tensor) -> Tensor:
        """``front @ matrix``, ``[n * positions, m]`` to ``[r * positions, m]``."""
        rows = self.factor @ matrix.reshape(self.factor.shape[1], -1)
        return rows.reshape(-1, matrix.shape[1])

    def dense(self) -> Tensor:
        """The matrix ``[r * positions, n * positions]``."""
        eye = torch.eye(self.positions, dtype=self.factor.dtype, device=self.factor.device)
        return torch.kron(self.factor.contiguous(), eye)


def regressions(module: nn.Module, stats: LayerStats | None, *, centred: bool = True) -> list[Regression]:
    """The problems of a layer, one a group (a layer without groups has one).

    Args:
        module: the dense layer.
        stats: its statistics.
        centred: with the bias free, where the layer can have one; otherwise the map goes through the origin.
    """
    matrices = matrices_of(module)
    groups = len(matrices)
    bias = bias_of(module)
    biases = [None] * groups if bias is None else bias.unflatten(0, (groups, -1))
    known = [None if stats is None else stats.group(k) for k in range(groups)]
    free = bias is not None or stats is None or stats.free_bias
    centred = centred and takes_bias(module) and free
    return [Regression.of(m, b, s, centred=centred) for m, b, s in zip(matrices, biases, known, strict=True)]


def joint_bias(problems: Sequence[Regression], products: Sequence[Tensor]) -> Tensor | None:
    """:meth:`Regression.corrected_bias` of all groups, one after the other."""
    pairs = zip(problems, products, strict=True)
    parts = [bias for bias in (problem.corrected_bias(product) for problem, product in pairs) if bias is not None]
    return torch.cat(parts) if parts else None


def _add_ridge(moment: Tensor, ridge: Tensor) -> Tensor:
    if moment.ndim == 1:
        return moment + ridge
    result = moment.clone()
    result.diagonal().add_(ridge)
    return result


def _identity(n: int, like: Tensor) -> Root:
    return Root(torch.ones(n, dtype=torch.float64, device=like.device))
