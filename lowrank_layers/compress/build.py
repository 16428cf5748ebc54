"""Building the layer that one line of a plan asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibrate.statistics import LayerStats
from ..errors import LowRankError
from ..layers import FactoredModule, Int8Layer, weight_from_matrices, weight_of
from ..linalg import full_precision
from .candidates import Candidate
from .damping import Damping
from .entry import Entry
from .int8 import build_int8
from .registry import DENSE
from .regression import Metric, joint_bias


@full_precision
def build_layer(
    dense: nn.Module,
    entry: Entry,
    stats: LayerStats | None,
    damping: Damping,
    outputs: Sequence[Metric | None] | None = None,
) -> FactoredModule | Int8Layer:
    """Returns the new layer of an entry; with statistics the one that minimises the weighted error.

    Args:
        dense: the dense layer.
        entry: its line of the plan.
        stats: its statistics.
        damping: ridges on the moments.
        outputs: as in :class:`Candidate`.
    """
    if stats is not None:
        stats = stats.changed(free_bias=entry.bias)  # a plan made without statistics counts no new biases
    try:
        layer = Candidate(dense, stats, damping=damping, outputs=outputs)
        method = None if entry.method == DENSE else entry.built_by()
        if method is None or entry.bits is not None:
            return build_int8(layer, method, entry.rank)
        return method.build(layer, entry.rank)
    except LowRankError as error:
        raise type(error)(f"{entry.name!r}: {error}") from None


@full_precision
def refit(dense: nn.Module, stats: LayerStats, damping: Damping) -> tuple[Tensor, Tensor | None]:
    """Returns the dense layer's best weight and bias on the inputs that a compressed prefix delivers.

    Without a bias the map goes through the origin.
    """
    problems = Candidate(dense, stats.changed(free_bias=False), damping=damping).problems
    fulls = [problem.full for problem in problems]
    return weight_from_matrices(dense, torch.stack(fulls)), joint_bias(problems, fulls)


@torch.no_grad()
def write_(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a dense layer these values, in place."""
    weight_of(layer).copy_(weight)
    if bias is not None:
        layer.get_parameter("bias").copy_(bias)
