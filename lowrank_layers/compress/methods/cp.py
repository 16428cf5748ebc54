"""CP for convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce as fold_left
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStats
from ...decompose import cp
from ...factors import CP
from ...layers import (
    CPConv,
    CPConv1d,
    CPConv2d,
    CPConv3d,
    CPConvTranspose1d,
    CPConvTranspose2d,
    CPConvTranspose3d,
    FactoredModule,
    is_transposed,
)
from ...layers.cp_conv import choose_cp_rank, cp_limit
from ...layers.kernel import kernel_area, kernel_of
from ...linalg import khatri_rao
from .base import Option, affine, factored_cost, layer_for, repeated_cost
from .regression import Front, Regression, joint_bias
from .weighting import kernel_problems, weighted_kernel

SWEEPS = 30
"""Of alternating least squares: the same for the estimate and for the layer that is built."""


@dataclass(frozen=True)
class CPMethod:
    """Sums of separable kernels, for convolutions without groups (those of a group are small already).

    The components come from the kernel weighted on its channel modes; given the thin factors, the expansion is the
    optimum of the weighted regression. With statistics transposed convolutions are left to other methods, as in
    :class:`TuckerMethod`.

    Args:
        steps: how many ranks are considered; each one is a decomposition of its own.
    """

    name: ClassVar[str] = "cp"
    form: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (
        CPConv1d,
        CPConv2d,
        CPConv3d,
        CPConvTranspose1d,
        CPConvTranspose2d,
        CPConvTranspose3d,
    )

    steps: int = 8

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer: a 1 x 1 kernel is a matrix."""
        fits = layer_for(self, module) is not None
        return fits and kernel_area(module) > 1 and len(kernel_of(module)) == 1

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """A handful of ranks, smaller than the dense layer."""
        if is_transposed(module) and stats is not None:
            return []
        one, two = (factored_cost(self, module, rank, stats) for rank in (1, 2))
        dense = repeated_cost(module, stats)
        limit = cp_limit(tuple(kernel_of(module).shape[1:]))
        top = min(limit, (dense.params - 1 - one.params) // (two - one).params + 1)
        ranks = sorted({max(1, round(top * k / self.steps)) for k in range(1, self.steps + 1)}) if top >= 1 else []
        (problem,) = kernel_problems(module, stats)
        options = []
        for rank in ranks:
            features = self._features(module, problem, rank)[0]
            captured = float(problem.after(Front(features)).matrix.square().sum())
            loss = max(problem.energy - 0.5 * problem.scale * captured, 0.0)
            options.append(Option(rank, affine(one, two, rank - 1), loss))
        return options

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> int:
        """The rank that an integer or a rule on sizes means."""
        cls = layer_for(self, module)
        assert cls is not None
        return choose_cp_rank(rank, tuple(kernel_of(module).shape[1:]), cls.__name__)

    def build(self, module: nn.Module, rank: int, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""
        cls = layer_for(self, module)
        assert cls is not None
        assert issubclass(cls, CPConv)
        if stats is None or is_transposed(module):
            return cls.from_dense(module, rank=rank)
        (problem,) = kernel_problems(module, stats)
        features, thin = self._features(module, problem, rank)
        expand = problem.after(Front(features)).full
        bias = joint_bias([problem], [expand @ features])
        return cls.from_matrices(module, [matrix[None] for matrix in (expand, *thin)], bias)

    def _features(self, conv: nn.Module, problem: Regression, rank: int) -> tuple[Tensor, list[Tensor]]:
        """The map ``[rank, in*area]`` from patches to the components' responses, and its thin factors."""
        kernel, root = weighted_kernel(conv, problem)
        found: CP = cp(kernel.float(), rank, sweeps=SWEEPS, starts=1)
        reduce, *axes = (factor.double() for factor in found.factors[1:])
        reduce = root.divide(reduce)
        reduce = reduce / torch.linalg.vector_norm(reduce, dim=0).clamp_min(1e-300)
        return fold_left(khatri_rao, axes, reduce).mT, [reduce, *axes]
