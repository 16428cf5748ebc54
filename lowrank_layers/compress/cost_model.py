"""What a layer costs, dense or factored: the seam for costs that are not counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn

from ..calibrate.statistics import LayerStats
from ..cost import Cost
from ..layers import layer_cost


class CostModel(Protocol):
    """Prices a layer. :func:`make_plan` asks it for the cost of every dense layer and of every option.

    Write a class with these two members for a cost that is not a count, and pass an instance as ``cost_model=``.
    Subclass or call :class:`CountedCost` for the fields of :class:`Cost` that stay as they are.
    """

    @property
    def affine(self) -> bool:
        """Whether the cost is affine in each rank, so that prices at ranks 1 and 2 give those at all ranks."""

    def cost(self, layer: nn.Module, stats: LayerStats | None) -> Cost:
        """Cost of a layer for one sample of the model.

        Args:
            layer: the dense layer, or a factored layer on the meta device, which has shapes and no values.
            stats: statistics of the dense layer, with the shape of its input and its number of calls; ``None`` where
                the model was not calibrated.
        """


@dataclass(frozen=True)
class CountedCost:
    """Counts parameters, multiply-accumulates and bytes: the default.

    Examples:
        >>> lr.CountedCost().cost(nn.Linear(8, 4), None)
        Cost(params=36, macs=0, bytes=144)
    """

    affine: ClassVar[bool] = True

    def cost(self, layer: nn.Module, stats: LayerStats | None) -> Cost:
        """:func:`layer_cost` for one sample of the model, which may call the layer several times.

        Args:
            layer: the dense or factored layer.
            stats: its statistics; without them multiply-accumulates are counted as 0.
        """
        if stats is None:
            return layer_cost(layer)
        cost = layer_cost(layer, stats.input_shape)
        return Cost(cost.params, round(cost.macs * stats.repeats), cost.bytes)
