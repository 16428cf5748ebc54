"""Truncated SVD in pivot form: fewer numbers for the same map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...layers import (
    ConvNd,
    FactoredModule,
    PivotConv,
    PivotConv1d,
    PivotConv2d,
    PivotConv3d,
    PivotLinear,
    PivotTransposedLinear,
    linear_shape,
)
from ...layers.kernel import kernel_area
from ..candidates import Candidate
from ..method import Option, layer_for, quadratic_costs
from ..pair_rank import pair_rank
from ..regression import joint_bias


@dataclass(frozen=True)
class PivotMethod:
    """Replaces linear layers and convolutions by what :class:`SVDMethod` builds, in ``r * r`` fewer numbers.

    At every rank it has the loss of the pair and costs less: in parameters, and linear layers in multiply-accumulates;
    in bytes too, but for the lowest ranks, where ``r * r`` numbers take no more than the order of the inputs. A pair
    copies nothing and may be faster, so that a plan under a limit on latency, which times both, may choose either.

    Of a convolution only the pointwise part, 1 of ``k * k`` positions, has this form. Where the kernel is larger than
    that it gains nothing over the other methods: ResNet-20 with 70 / 50 / 30 % of its parameters is right on
    91.17 / 91.25 / 88.99 % of CIFAR-10's test images if all convolutions are offered in this form, and on
    91.27 / 91.27 / 89.10 % if none is (means over three sets of images for calibration).

    Args:
        max_kernel: convolutions whose kernel has more positions get no options, as in ``max_kernel=9`` for 3 x 3.
    """

    name: ClassVar[str] = "pivot"
    form: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (
        PivotLinear,
        PivotTransposedLinear,
        PivotConv1d,
        PivotConv2d,
        PivotConv3d,
    )

    max_kernel: int = 1

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer."""
        return layer_for(self, layer.module) is not None

    def options(self, layer: Candidate) -> list[Option]:
        """Returns every rank at which the layer has fewer parameters than the dense one and takes no more bytes."""
        if isinstance(layer.module, ConvNd) and kernel_area(layer.module) > self.max_kernel:
            return []
        ranks = range(1, min(linear_shape(layer.module)[1:]) + 1)
        losses = torch.stack(layer.tails).sum(0)[1:].tolist()
        offers = map(Option, ranks, quadratic_costs(self, layer, ranks), losses)
        before = layer.before
        return [each for each in offers if each.cost.params < before.params and each.cost.bytes <= before.bytes]

    def choose(self, layer: Candidate, rank: Any) -> int:
        """Returns the rank that an integer or a rule means; a rule sees the weighted spectrum, or refits the matrix."""
        return pair_rank(self, layer, rank, pivot=True)

    def build(self, layer: Candidate, rank: int) -> FactoredModule:
        """Returns the factored layer; with statistics the one that minimises the weighted error."""
        cls = layer_for(self, layer.module)
        assert cls is not None
        if layer.stats is None:
            return cls.from_dense(layer.module, rank=rank)
        ups, downs = zip(*(problem.pair(rank) for problem in layer.problems), strict=True)
        bias = joint_bias(layer.problems, [up @ down for up, down in zip(ups, downs, strict=True)])
        if issubclass(cls, PivotConv):
            return cls.from_pairs(layer.module, torch.stack(ups), torch.stack(downs), bias)
        assert issubclass(cls, PivotLinear)
        return cls.from_pair(layer.module, ups[0], downs[0], bias)
