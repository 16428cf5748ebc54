"""CP for convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...decompose import cp
from ...factors import CP
from ...layers import CPConv2d, FactoredModule
from ...layers.base import fill
from ...layers.cp import choose_cp_rank, cp_limit
from ...linalg import khatri_rao
from ...moments import LayerStats
from .base import Option, affine, factored_cost, has_bias, matches_type, repeated_cost
from .regression import Regression
from .weighting import weighted_kernel

SWEEPS = 30
"""Of alternating least squares: the same for the estimate and for the layer that is built."""


@dataclass(frozen=True)
class CPMethod:
    """Sums of separable kernels.

    The components come from the kernel weighted on its channel modes; given the three thin factors, the expansion is
    the optimum of the weighted regression.

    Args:
        steps: how many ranks are considered; each one is a decomposition of its own.
    """

    name: ClassVar[str] = "cp"

    steps: int = 8

    @property
    def layers(self) -> Mapping[type[nn.Module], type[FactoredModule]]:
        """Dense type to the factored type that replaces it."""
        return {nn.Conv2d: CPConv2d}

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer: a 1 x 1 kernel is a matrix."""
        return matches_type(self, module) and max(module.kernel_size) > 1  # type: ignore[arg-type]

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """A handful of ranks, smaller than the dense layer."""
        assert isinstance(module, nn.Conv2d)
        problem = Regression.of(module, stats)
        one, two = (factored_cost(self, module, rank, stats) for rank in (1, 2))
        dense = repeated_cost(module, stats)
        top = min(cp_limit(tuple(module.weight.shape)), (dense.params - 1 - one.params) // (two - one).params + 1)
        ranks = sorted({max(1, round(top * k / self.steps)) for k in range(1, self.steps + 1)}) if top >= 1 else []
        options = []
        for rank in ranks:
            features = self._features(module, problem, rank)[0]
            captured = float(problem.after(features).matrix.square().sum())
            loss = max(problem.energy - 0.5 * problem.scale * captured, 0.0)
            options.append(Option(rank, affine(one, two, rank - 1), loss))
        return options

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> int:
        """The rank that an integer or a rule on sizes means."""
        return choose_cp_rank(rank, tuple(module.weight.shape), CPConv2d.__name__)  # type: ignore[arg-type]

    def build(self, module: nn.Module, rank: int, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""
        assert isinstance(module, nn.Conv2d)
        if stats is None:
            return CPConv2d.from_dense(module, rank=rank)
        problem = Regression.of(module, stats)
        features, thin = self._features(module, problem, rank)
        expand = problem.after(features).full
        bias = problem.corrected_bias(expand @ features)
        layer = CPConv2d.like(module, rank=rank, bias=has_bias(module, stats))
        return fill(layer, [*(factor.mT for factor in thin), expand], bias)

    def _features(self, conv: nn.Conv2d, problem: Regression, rank: int) -> tuple[Tensor, list[Tensor]]:
        """The map ``[rank, in*kh*kw]`` from patches to the components' responses, and its three thin factors."""
        kernel, root = weighted_kernel(conv, problem)
        found: CP = cp(kernel.float(), rank, sweeps=SWEEPS, starts=1)
        reduce, vertical, horizontal = (factor.double() for factor in found.factors[1:])
        reduce = root.divide(reduce)
        reduce = reduce / torch.linalg.vector_norm(reduce, dim=0).clamp_min(1e-300)
        return khatri_rao(khatri_rao(reduce, vertical), horizontal).mT, [reduce, vertical, horizontal]
