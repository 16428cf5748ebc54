"""Truncated SVD: a pair of factors for every matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

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
from ...layers.conversion import fill
from ..candidates import Candidate
from ..method import Option, factored_costs, layer_for, smaller_ranks
from ..pair_rank import pair_rank
from ..regression import joint_bias


@dataclass(frozen=True)
class SVDMethod:
    """Replaces linear layers, convolutions (channel SVD) and embeddings by pairs, by SVD of the weighted matrix."""

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

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer."""
        return layer_for(self, layer.module) is not None

    def options(self, layer: Candidate) -> list[Option]:
        """Returns every rank at which the layer is smaller than the dense one."""
        ranks = smaller_ranks(self, layer, min(linear_shape(layer.module)[1:]))
        if not ranks:
            return []
        losses = torch.stack(layer.tails).sum(0)[1 : len(ranks) + 1].tolist()
        return list(map(Option, ranks, factored_costs(self, layer, ranks), losses))

    def choose(self, layer: Candidate, rank: Any) -> int:
        """Returns the rank that an integer or a rule means; a rule sees the weighted spectrum, or refits the matrix."""
        return pair_rank(self, layer, rank)

    def build(self, layer: Candidate, rank: int) -> FactoredModule:
        """Returns the factored layer; with statistics the one that minimises the weighted error."""
        module = layer.module
        cls = layer_for(self, module)
        assert cls is not None
        if layer.stats is None:
            return cls.from_dense(module, rank=rank)
        ups, downs = zip(*(problem.pair(rank) for problem in layer.problems), strict=True)
        if issubclass(cls, (LowRankEmbedding, LowRankEmbeddingBag)):
            return cls.from_pair(module, downs[0].mT, ups[0])
        bias = joint_bias(layer.problems, [up @ down for up, down in zip(ups, downs, strict=True)])
        if issubclass(cls, PairConv):
            return cls.from_pairs(module, torch.stack(ups), torch.stack(downs), bias)
        return fill(cls.like(module, rank=rank, bias=layer.has_bias), [downs[0], ups[0]], bias)
