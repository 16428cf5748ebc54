"""A pair for every matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStats
from ...layers import (
    FactoredModule,
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    LowRankLinear,
    LowRankTransposedLinear,
    PairConv,
    linear_shape,
)
from ...layers.base import fill
from ...layers.linear import pair_spectrum
from ...rank import choose_rank
from .base import Option, affine, factored_cost, factored_like, has_bias, layer_for, repeated_cost
from .regression import Regression, joint_bias, regressions


@dataclass(frozen=True)
class SVDMethod:
    """Linear layers, convolutions (channel SVD) and tables as a pair; the optimum of the weighted problem."""

    name: ClassVar[str] = "svd"
    form: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (
        LowRankLinear,
        LowRankTransposedLinear,
        LowRankConv1d,
        LowRankConv2d,
        LowRankConv3d,
        LowRankConvTranspose1d,
        LowRankConvTranspose2d,
        LowRankConvTranspose3d,
        LowRankEmbedding,
        LowRankEmbeddingBag,
    )

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer."""
        return layer_for(self, module) is not None

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """Every rank that is smaller than the dense layer."""
        one, two = (factored_cost(self, module, rank, stats) for rank in (1, 2))
        dense = repeated_cost(module, stats)
        top = min(linear_shape(module)[1:])
        costs = [affine(one, two, r - 1) for r in range(1, top + 1)]
        costs = [cost for cost in costs if cost.params < dense.params]
        if not costs:
            return []
        tails = total_tails(regressions(module, stats)).tolist()
        return [Option(r, cost, tails[r]) for r, cost in enumerate(costs, start=1)]

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> int:
        """The rank that an integer or a rule means, on the weighted spectrum where there are statistics."""
        _, rows, columns = linear_shape(module)
        values = None
        if not isinstance(rank, int):
            values = torch.stack([p.singular_values() for p in regressions(module, stats)]).square().mean(0).sqrt()
        owner = type(factored_like(self, module, 1, bias=False)).__name__
        return choose_rank(rank, pair_spectrum(rows, columns, values, owner), min(rows, columns))

    def build(self, module: nn.Module, rank: int, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""
        cls = layer_for(self, module)
        assert cls is not None
        if stats is None:
            return cls.from_dense(module, rank=rank)
        problems = regressions(module, stats)
        ups, downs = zip(*(problem.pair(rank) for problem in problems), strict=True)
        if issubclass(cls, (LowRankEmbedding, LowRankEmbeddingBag)):
            return cls.from_pair(module, downs[0].mT, ups[0])
        bias = joint_bias(problems, [up @ down for up, down in zip(ups, downs, strict=True)])
        if issubclass(cls, PairConv):
            return cls.from_pairs(module, torch.stack(ups), torch.stack(downs), bias)
        return fill(cls.like(module, rank=rank, bias=has_bias(module, stats)), [downs[0], ups[0]], bias)


def total_tails(problems: list[Regression]) -> Tensor:
    """Loss increase of all groups at rank 0, 1, 2, ..."""
    return torch.stack([problem.tails() for problem in problems]).sum(0)
