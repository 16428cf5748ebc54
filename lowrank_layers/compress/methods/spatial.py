"""Spatial SVD: a k x 1 and a 1 x k convolution for a k x k one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...layers import FactoredModule, LowRankConv2d
from ...layers.kernel import kernel_of, kernel_size_of, matrix_of
from ...linalg import exact_svd
from ...rank import choose_rank, pair_spectrum
from ..candidates import Candidate
from ..method import Option, factored_costs, layer_for, smaller_ranks, spread
from ..regression import FirstStage, joint_bias

_AXES = (0,)
"""Spatial axes of the first convolution."""


@dataclass(frozen=True)
class SpatialMethod:
    """Replaces a 2-d convolution by a vertical and a horizontal one (Jaderberg et al., 2014).

    The vertical one comes from the kernel weighted on its channel modes; given that, the horizontal one is the optimum
    of the weighted regression.

    Args:
        steps: number of ranks considered.
    """

    name: ClassVar[str] = "spatial"
    form: ClassVar[dict[str, Any]] = {"mode": "spatial"}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (LowRankConv2d,)

    steps: int = 8

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer, whose kernel must have two axes."""
        return layer_for(self, layer.module) is not None and min(kernel_size_of(layer.module)) > 1

    def options(self, layer: Candidate) -> list[Option]:
        """Returns a handful of ranks at which the layer is smaller than the dense one."""
        out, into, height, width = kernel_of(layer.module).shape[1:]
        top = len(smaller_ranks(self, layer, min(out * width, into * height)))
        ranks = spread(top, self.steps, layer.round_to)
        losses = _losses(layer, ranks) if ranks else []
        return [
            Option(rank, cost, max(loss, 0.0))
            for rank, cost, loss in zip(ranks, factored_costs(self, layer, ranks), losses, strict=True)
        ]

    def choose(self, layer: Candidate, rank: Any) -> int:
        """Returns the rank that an integer or a rule means; a rule sees the weighted kernel."""
        matrices = torch.stack([_as_matrix(kernel) for kernel, _ in layer.weighted_kernels])
        values = torch.linalg.svdvals(matrices).square().mean(0).sqrt()
        rows, columns = matrices.shape[1:]
        return choose_rank(rank, pair_spectrum(rows, columns, values, LowRankConv2d.__name__), min(rows, columns))

    def build(self, layer: Candidate, rank: int) -> FactoredModule:
        """Returns the factored layer; with statistics the one that minimises the weighted error."""
        module = layer.module
        if layer.stats is None:
            return LowRankConv2d.from_dense(module, rank=rank, **self.form)
        width = kernel_size_of(module)[1]
        verticals = _verticals(layer, rank)
        stages = [FirstStage(vertical, width) for vertical in verticals]  # it runs in every column of a patch
        fulls = [problem.after(stage).full for problem, stage in zip(layer.problems, stages, strict=True)]
        bias = joint_bias(layer.problems, [full @ stage.dense() for full, stage in zip(fulls, stages, strict=True)])
        # [out, rank * width] to the rows (out, width) of the second matrix
        lasts = torch.stack([full.unflatten(1, (-1, width)).mT.flatten(0, 1) for full in fulls])
        return LowRankConv2d.from_pairs(module, lasts, torch.stack(verticals), bias, **self.form)


def _as_matrix(kernel: Tensor) -> Tensor:
    """A kernel as ``[out * kw, in * kh]``."""
    return matrix_of(kernel[None], _AXES)[0]


def _verticals(layer: Candidate, rank: int) -> list[Tensor]:
    """Each group's vertical convolution, the most useful outputs first, ``[rank, in * kh]``."""
    height = kernel_size_of(layer.module)[0]
    verticals = []
    for kernel, root in layer.weighted_kernels:
        vertical = exact_svd(_as_matrix(kernel))[2][:rank].unflatten(1, (-1, height)).movedim(1, 0)
        verticals.append(root.divide(vertical.flatten(1)).reshape_as(vertical).movedim(0, 1).flatten(1))
    return verticals


def _losses(layer: Candidate, ranks: list[int]) -> list[float]:
    """Loss increase at each rank."""
    if layer.stats is None:
        values = torch.linalg.svdvals(matrix_of(kernel_of(layer.module).detach().double(), _AXES)).square()
        left = values.sum(1, keepdim=True) - values.cumsum(1)
        return [0.5 * float(left[:, rank - 1].sum()) for rank in ranks]
    width = kernel_size_of(layer.module)[1]
    verticals = _verticals(layer, ranks[-1])
    return [
        sum(
            problem.energy - problem.after(FirstStage(vertical[:rank], width)).energy
            for problem, vertical in zip(layer.problems, verticals, strict=True)
        )
        for rank in ranks
    ]
