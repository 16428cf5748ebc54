"""What a plan is asked for, as one value that is passed through planning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..calibrate.statistics import LayerStats, Statistics
from .candidates import Candidate
from .cost_model import CostModel
from .damping import Damping
from .methods import Method


@dataclass(frozen=True)
class Request:
    """What weights, prices and factorizes the layers of one plan.

    Args:
        methods: those that compete for a layer.
        stats: what calibration found.
        damping: ridges on the moments in the statistics.
        cost_model: prices layers and options.
    """

    methods: tuple[Method, ...]
    stats: Statistics | None
    damping: Damping
    cost_model: CostModel

    def candidate(self, module: nn.Module, stats: LayerStats | None, *, idle: bool = False) -> Candidate:
        """A layer of the model, as methods see it."""
        return Candidate(module, stats, damping=self.damping, cost_model=self.cost_model, idle=idle)
