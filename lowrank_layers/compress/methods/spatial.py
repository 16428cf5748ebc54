"""k x 1, then 1 x k: a separable pair for 2-d convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStats
from ...layers import FactoredModule, LowRankConv2d
from ...layers.kernel import kernel_of, kernel_size_of, matrix_of
from ...layers.linear import pair_spectrum
from ...linalg import Root, exact_svd
from ...rank import choose_rank
from .base import Option, affine, factored_cost, layer_for, repeated_cost
from .regression import Front, Regression, joint_bias, regressions
from .weighting import weighted_kernel

_AXES = (0,)
"""The spatial axes of the first convolution."""


@dataclass(frozen=True)
class SpatialMethod:
    """A vertical and a horizontal convolution in the place of a 2-d one (Jaderberg et al., 2014).

    The vertical one comes from the kernel weighted on its channel modes; given that, the horizontal one is the optimum
    of the weighted regression.

    Args:
        steps: how many ranks are considered.
    """

    name: ClassVar[str] = "spatial"
    form: ClassVar[dict[str, Any]] = {"mode": "spatial"}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (LowRankConv2d,)

    steps: int = 8

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer: its kernel must have two axes."""
        return layer_for(self, module) is not None and min(kernel_size_of(module)) > 1

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """A handful of ranks, smaller than the dense layer."""
        one, two = (factored_cost(self, module, rank, stats) for rank in (1, 2))
        dense = repeated_cost(module, stats)
        top = min(_limit(module), (dense.params - 1 - one.params) // (two - one).params + 1)
        if top < 1:
            return []
        ranks = sorted({max(1, round(top * k / self.steps)) for k in range(1, self.steps + 1)})
        losses = _losses(module, stats, ranks)
        return [Option(r, affine(one, two, r - 1), max(loss, 0.0)) for r, loss in zip(ranks, losses, strict=True)]

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> int:
        """The rank that an integer or a rule means, on the weighted kernel where there are statistics."""
        matrices = torch.stack([_weighted_matrix(module, problem)[0] for problem in regressions(module, stats)])
        values = torch.linalg.svdvals(matrices).square().mean(0).sqrt()
        rows, columns = matrices.shape[1:]
        return choose_rank(rank, pair_spectrum(rows, columns, values, LowRankConv2d.__name__), min(rows, columns))

    def build(self, module: nn.Module, rank: int, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""
        if stats is None:
            return LowRankConv2d.from_dense(module, rank=rank, **self.form)
        problems = regressions(module, stats)
        verticals = [_verticals(module, problem, rank) for problem in problems]
        width = kernel_size_of(module)[1]
        fronts = [Front(vertical, width) for vertical in verticals]  # it runs in every column of a patch
        fulls = [problem.after(front).full for problem, front in zip(problems, fronts, strict=True)]
        bias = joint_bias(problems, [full @ front.dense() for full, front in zip(fulls, fronts, strict=True)])
        # [out, rank * width] to the rows (out, width) of the second matrix
        lasts = torch.stack([full.unflatten(1, (-1, width)).mT.flatten(0, 1) for full in fulls])
        return LowRankConv2d.from_pairs(module, lasts, torch.stack(verticals), bias, **self.form)


def _limit(conv: nn.Module) -> int:
    out, into, height, width = kernel_of(conv).shape[1:]
    return min(out * width, into * height)


def _weighted_matrix(conv: nn.Module, problem: Regression) -> tuple[Tensor, Root]:
    """The weighted kernel as ``[out*kw, in*kh]``, and the root of the channels' moment."""
    kernel, root = weighted_kernel(conv, problem)
    return matrix_of(kernel[None], _AXES)[0], root


def _verticals(conv: nn.Module, problem: Regression, rank: int) -> Tensor:
    """The vertical convolution, the most useful outputs first, ``[rank, in*kh]``."""
    matrix, root = _weighted_matrix(conv, problem)
    vertical = exact_svd(matrix)[2][:rank].unflatten(1, (-1, conv.kernel_size[0]))  # type: ignore[index]
    moved: Tensor = vertical.movedim(1, 0)
    return root.divide(moved.flatten(1)).reshape_as(moved).movedim(0, 1).flatten(1)


def _losses(conv: nn.Module, stats: LayerStats | None, ranks: list[int]) -> list[float]:
    """Loss increase at each rank."""
    if stats is None:
        values = torch.linalg.svdvals(matrix_of(kernel_of(conv).detach().double(), _AXES)).square()
        left = values.sum(1, keepdim=True) - values.cumsum(1)
        return [0.5 * float(left[:, rank - 1].sum()) for rank in ranks]
    problems = regressions(conv, stats)
    fronts = [_verticals(conv, problem, ranks[-1]) for problem in problems]
    losses = []
    for rank in ranks:
        loss = 0.0
        for problem, vertical in zip(problems, fronts, strict=True):
            left = problem.after(Front(vertical[:rank], kernel_size_of(conv)[1])).matrix
            loss += problem.energy - 0.5 * problem.scale * float(left.square().sum())
        losses.append(loss)
    return losses
