"""The weighted problem of a layer that reads hidden units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ...calibrate.statistics import LayerStats
from ...layers import weight_of
from ..candidates import Candidate
from ..damping import Damping, rounding_of
from ..regression import Metric, Regression, add_ridge_


def unit_problem(
    layer: nn.Module, stats: LayerStats, damping: Damping, outputs: Sequence[Metric | None] | None = None
) -> Regression:
    """Returns the weighted problem of a layer, from which columns are taken.

    The variance of nearly constant units is the rounding of their products, which nothing may be predicted from: it is
    added as a ridge.

    Args:
        layer: the layer that reads the units.
        stats: its statistics.
        damping: ridges on the moments.
        outputs: as in :class:`Candidate`.
    """
    problem = Candidate(layer, stats, damping=damping, outputs=outputs).problems[0]
    rounding = rounding_of(weight_of(layer).dtype) * stats.inputs.second.diagonal().mean()
    inputs = Metric(add_ridge_(problem.inputs.matrix.clone(), rounding))
    moved = None if problem.moved is None else problem.moved + rounding * problem.weight
    return replace(problem, inputs=inputs, moved=moved)
