"""The contract of a method: one dense layer in, options with their price out, one factored layer built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from ...calibrate.statistics import LayerStats
from ...cost import Cost
from ...errors import LowRankError
from ...layers import FactoredModule, bias_of, layer_cost, meta_twin, takes_bias


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Args:
        rank: what the layer's ``rank=`` takes; ``None`` leaves it dense.
        cost: what it costs then.
        loss_increase: estimated growth of the loss, in the units of the statistics.
    """

    rank: Any
    cost: Cost
    loss_increase: float


class Method(Protocol):
    """A way to factorize layers. Implementations are frozen dataclasses."""

    name: ClassVar[str]
    """What plans and files call it."""

    @property
    def layers(self) -> tuple[type[FactoredModule], ...]:
        """What it builds, one for each kind of dense layer."""

    @property
    def form(self) -> Mapping[str, Any]:
        """What besides the rank it asks of them: see :attr:`FactoredModule.form`."""

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer."""

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """Ranks worth considering, with cost and estimated loss; smaller than the dense layer."""

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> Any:
        """The rank that an integer or a rule means here, on the weighted spectrum where there are statistics."""

    def build(self, module: nn.Module, rank: Any, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""


def layer_for(method: Method, module: nn.Module) -> type[FactoredModule] | None:
    """The factored type by which a method replaces a dense layer, if it does."""
    return next((cls for cls in method.layers if cls.stands_for(module)), None)


def factored_like(method: Method, module: nn.Module, rank: Any, bias: bool) -> FactoredModule:
    """The method's layer with the settings of ``module``, uninitialized."""
    cls = layer_for(method, module)
    if cls is None:
        raise LowRankError(f"the method {method.name!r} does not take a {type(module).__name__}.")
    like: Any = cls.like  # only those that have a form take one
    layer: FactoredModule = like(module, rank=rank, bias=bias, **method.form)
    return layer


def factored_cost(method: Method, module: nn.Module, rank: Any, stats: LayerStats | None) -> Cost:
    """The cost of the layer that :meth:`Method.build` would return, without building it."""
    return repeated_cost(factored_like(method, meta_twin(module), rank, has_bias(module, stats)), stats)


def repeated_cost(module: nn.Module, stats: LayerStats | None) -> Cost:
    """:func:`layer_cost` for one sample of the model."""
    cost = layer_cost(module, None if stats is None else stats.input_shape)
    return cost if stats is None else Cost(cost.params, round(cost.macs * stats.repeats), cost.bytes)


def has_bias(module: nn.Module, stats: LayerStats | None) -> bool:
    """Whether the factored layer has a bias: once the input means are known, it corrects the mean of the output."""
    return bias_of(module) is not None or (stats is not None and stats.free_bias and takes_bias(module))


def affine(first: Cost, second: Cost, steps: int) -> Cost:
    """``first + steps * (second - first)``: the cost of rank ``1 + steps`` of a method whose cost is affine in it."""
    d = second - first
    return Cost(first.params + steps * d.params, first.macs + steps * d.macs, first.bytes + steps * d.bytes)
