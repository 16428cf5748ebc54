"""A pair for every matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...layers import FactoredModule, LowRankConv2d, LowRankEmbedding, LowRankLinear
from ...layers.base import fill
from ...layers.linear import pair_spectrum
from ...moments import LayerStats
from ...rank import choose_rank
from .base import Option, affine, factored_cost, has_bias, matches_type, repeated_cost
from .regression import Regression


@dataclass(frozen=True)
class SVDMethod:
    """Linear, convolution (channel SVD) and embedding as a pair; the optimum of the weighted problem."""

    name: ClassVar[str] = "svd"

    @property
    def layers(self) -> Mapping[type[nn.Module], type[FactoredModule]]:
        """Dense type to the factored type that replaces it."""
        return {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d, nn.Embedding: LowRankEmbedding}

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer."""
        return matches_type(self, module)

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """Every rank that is smaller than the dense layer."""
        problem = Regression.of(module, stats)
        tails = problem.tails().tolist()
        one, two = (factored_cost(self, module, rank, stats) for rank in (1, 2))
        dense = repeated_cost(module, stats)
        options = [Option(r, affine(one, two, r - 1), tails[r]) for r in range(1, min(problem.weight.shape) + 1)]
        return [option for option in options if option.cost.params < dense.params]

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> int:
        """The rank that an integer or a rule means, on the weighted spectrum where there are statistics."""
        problem = Regression.of(module, stats)
        rows, columns = problem.weight.shape
        values = None if isinstance(rank, int) else problem.singular_values()
        spectrum = pair_spectrum(rows, columns, values, self.layers[type(module)].__name__)
        return choose_rank(rank, spectrum, min(rows, columns))

    def build(self, module: nn.Module, rank: int, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""
        if stats is None:
            return self.layers[type(module)].from_dense(module, rank=rank)
        problem = Regression.of(module, stats)
        up, down = problem.pair(rank)
        if isinstance(module, nn.Embedding):
            return LowRankEmbedding.from_pair(module, down.mT, up)
        layer = self.layers[type(module)].like(module, rank=rank, bias=has_bias(module, stats))
        return fill(layer, [down, up], problem.corrected_bias(up @ down))
