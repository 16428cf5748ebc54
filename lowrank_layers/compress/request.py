"""The arguments of make_plan that concern single layers, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..calibrate.statistics import LayerStats, Statistics
from .candidates import Candidate
from .cost_model import CostModel
from .damping import Damping
from .method import Method


@dataclass(frozen=True)
class Request:
    """The methods that compete for the layers of a plan, and how layers are weighted and priced.

    Args:
        methods: the methods, in order of preference where one rank or rule is given.
        stats: the result of :func:`calibrate`, if there is one.
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
