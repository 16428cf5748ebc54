"""Prices of layers, dense or factored, and the interface for costs that are not counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn

from ..calibrate.statistics import LayerStats
from ..cost import Cost
from ..layers import layer_cost


class CostModel(Protocol):
    """A way to price layers. :func:`make_plan` prices every dense layer and every option with it.

    For a cost that is not a count write a class with these two members and pass an instance as ``cost_model=``. A
    subclass of :class:`CountedCost` counts the fields of :class:`Cost` that it does not replace. What is edited later,
    by :meth:`Plan.set_rank`, is priced by count.

    Examples:
        >>> class Int8Cost(lr.CountedCost):
        ...     def cost(self, layer, stats):
        ...         counted = super().cost(layer, stats)
        ...         return lr.Cost(counted.params, counted.macs, bytes=counted.params)
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> lr.make_plan(model, lr.Budget(bytes=2_000), cost_model=Int8Cost()).after.bytes <= 2_000
        True
    """

    @property
    def affine(self) -> bool:
        """True if costs are integers, affine in each rank: those at ranks 1 and 2 give those at all ranks."""

    def cost(self, layer: nn.Module, stats: LayerStats | None) -> Cost:
        """Returns the cost of a layer for one sample of the model.

        Args:
            layer: the dense layer, or a factored layer on the meta device, which has shapes and no values.
            stats: statistics of the dense layer, with the shape of its input and its number of calls; ``None`` where
                the model was not calibrated.
        """


@dataclass(frozen=True)
class CountedCost:
    """The default cost model: counts parameters, multiply-accumulates and bytes.

    Examples:
        >>> lr.CountedCost().cost(nn.Linear(8, 4), None)
        Cost(params=36, macs=0, bytes=144)
    """

    affine: ClassVar[bool] = True

    def cost(self, layer: nn.Module, stats: LayerStats | None) -> Cost:
        """Returns :func:`layer_cost` for one sample of the model, which may call the layer several times.

        Args:
            layer: the dense or factored layer.
            stats: its statistics; without them multiply-accumulates are counted as 0.
        """
        if stats is None:
            return layer_cost(layer)
        cost = layer_cost(layer, stats.input_shape)
        return Cost(cost.params, round(cost.macs * stats.repeats), cost.bytes)
