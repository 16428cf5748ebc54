"""CP for convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce as fold_left
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...decompose import cp
from ...decompose.cp import cp_refit
from ...decompose.ranks import cp_limit, cp_rank
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
from ...layers.kernel import kernel_area, kernel_of
from ...linalg import khatri_rao
from ...rank import Refit
from ..candidates import Candidate
from ..method import Option, factored_costs, layer_for, smaller_ranks, spread
from ..regression import FirstStage, joint_bias

SWEEPS = 30
"""Sweeps of alternating least squares, as many for the estimate as for the layer that is built."""


@dataclass(frozen=True)
class CPMethod:
    """Replaces a convolution by a sum of separable kernels (CP; Lebedev et al., 2015).

    Convolutions with groups are left to other methods: their kernels are small already. The components come from the
    kernel weighted on its channel modes; given the thin factors, the expansion is the optimum of the weighted
    regression. With statistics transposed convolutions are left to other methods, as in :class:`TuckerMethod`.

    Args:
        steps: number of ranks considered; each one is a decomposition of its own.
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

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer; a 1 x 1 kernel is a matrix."""
        module = layer.module
        fits = layer_for(self, module) is not None
        return fits and kernel_area(module) > 1 and len(kernel_of(module)) == 1

    def options(self, layer: Candidate) -> list[Option]:
        """Returns a handful of ranks at which the layer is smaller than the dense one."""
        if is_transposed(layer.module) and layer.stats is not None:
            return []
        limit = cp_limit(tuple(kernel_of(layer.module).shape[1:]))
        ranks = spread(len(smaller_ranks(self, layer, limit)), self.steps, layer.round_to)
        (problem,) = layer.kernel_problems
        options = []
        for rank, cost in zip(ranks, factored_costs(self, layer, ranks), strict=True):
            features = _features(layer, rank)[0]
            options.append(Option(rank, cost, max(problem.energy - problem.after(FirstStage(features)).energy, 0.0)))
        return options

    def choose(self, layer: Candidate, rank: Any) -> int:
        """Returns the rank that an integer, a rule on sizes or one on decompositions of the weighted kernel means."""
        cls = layer_for(self, layer.module)
        assert cls is not None
        kernels = kernel_of(layer.module).detach()

        def refit() -> Refit:
            plain = layer.stats is not None and is_transposed(layer.module)
            return cp_refit(kernels[0] if plain else layer.weighted_kernels[0][0].float(), sweeps=SWEEPS)

        return cp_rank(rank, tuple(kernels.shape[1:]), cls.__name__, refit)

    def build(self, layer: Candidate, rank: int) -> FactoredModule:
        """Returns the factored layer; with statistics the one that minimises the weighted error."""
        module = layer.module
        cls = layer_for(self, module)
        assert cls is not None
        assert issubclass(cls, CPConv)
        if layer.stats is None or is_transposed(module):
            return cls.from_dense(module, rank=rank)
        (problem,) = layer.kernel_problems
        features, thin = _features(layer, rank)
        expand = problem.after(FirstStage(features)).full
        bias = joint_bias([problem], [expand @ features])
        return cls.from_matrices(module, [matrix[None] for matrix in (expand, *thin)], bias)


def _features(layer: Candidate, rank: int) -> tuple[Tensor, list[Tensor]]:
    """The map ``[rank, in * area]`` from patches to the components' responses, and its thin factors."""
    ((kernel, root),) = layer.weighted_kernels
    found: CP = cp(kernel.float(), rank, sweeps=SWEEPS, starts=1)
    reduce, *axes = (factor.double() for factor in found.factors[1:])
    reduce = root.divide(reduce)
    reduce = reduce / torch.linalg.vector_norm(reduce, dim=0).clamp_min(1e-300)
    return fold_left(khatri_rao, axes, reduce).mT, [reduce, *axes]
