"""The contract of a method: a dense layer comes in, priced options go out, and one factored layer is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..cost import Cost
from ..errors import LowRankError
from ..layers import FactoredModule, meta_twin
from .candidates import Candidate


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Args:
        rank: what the layer's ``rank=`` takes; ``None`` leaves it dense.
        cost: what it costs then.
        loss_increase: estimated growth of the loss, in the units of the statistics.
        bits: 8 where the layer's weights are stored in int8; ``None`` leaves them in floating point.
    """

    rank: Any
    cost: Cost
    loss_increase: float
    bits: int | None = None


class Method(Protocol):
    """A way to factorize layers. Implementations are frozen dataclasses; their fields are settings.

    Write one as a class with these members, and add an instance with :func:`register_method`.
    """

    name: ClassVar[str]
    """Its name in plans and files."""

    @property
    def layers(self) -> tuple[type[FactoredModule], ...]:
        """The layers that it builds, one for each kind of dense layer."""

    @property
    def form(self) -> Mapping[str, Any]:
        """Keywords of these layers' ``like`` besides the rank; see :attr:`FactoredModule.form`."""

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer.

        Args:
            layer: the dense layer, perhaps on the meta device and without statistics.
        """

    def options(self, layer: Candidate) -> list[Option]:
        """Returns the ranks worth considering, each with its cost (:func:`factored_costs`) and estimated loss.

        A factored layer that has no fewer parameters than the dense one is left out.

        Args:
            layer: a dense layer that matches.
        """

    def choose(self, layer: Candidate, rank: Any) -> Any:
        """Returns the rank that an integer or a rule means.

        Args:
            layer: a dense layer that matches; a rule sees its weighted spectrum.
            rank: what :func:`make_plan` was given as ``rank=``.
        """

    def build(self, layer: Candidate, rank: Any) -> FactoredModule:
        """Returns the factored layer; with statistics the one that minimises the weighted error.

        Args:
            layer: a dense layer that matches; it is not changed.
            rank: a rank out of ``options`` or ``choose``.
        """


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


def factored_cost(method: Method, layer: Candidate, rank: Any) -> Cost:
    """The cost of the layer that :meth:`Method.build` would return, without building it."""
    if (method, rank) not in layer.prices:
        twin = factored_like(method, meta_twin(layer.module), rank, layer.has_bias)
        layer.prices[method, rank] = layer.cost_model.cost(twin, layer.stats)
    return layer.prices[method, rank]


def factored_costs(method: Method, layer: Candidate, ranks: Sequence[Any]) -> list[Cost]:
    """:func:`factored_cost` of many ranks, integers or tuples of one length.

    A cost that is affine in each rank is known everywhere once it is known where each rank is 1 or 2.
    """
    if not layer.cost_model.affine or not ranks:
        return [factored_cost(method, layer, rank) for rank in ranks]
    steps = torch.tensor(ranks).reshape(len(ranks), -1) - 1
    corners = list(product((1, 2), repeat=steps.shape[1]))
    costs = [factored_cost(method, layer, corner if isinstance(ranks[0], tuple) else corner[0]) for corner in corners]
    prices = [(cost.params, cost.macs, cost.bytes) for cost in costs]
    shares = [torch.where(torch.tensor(corner) == 2, steps, 1 - steps).prod(1) for corner in corners]
    exact = torch.stack(shares, 1) @ torch.tensor(prices, dtype=torch.int64)
    return [Cost(*row) for row in exact.tolist()]


def quadratic_costs(method: Method, layer: Candidate, ranks: Sequence[int]) -> list[Cost]:
    """:func:`factored_costs` of many integer ranks, where both sizes of a factor depend on the rank.

    A cost that is affine in the sizes of factors is quadratic in such a rank, and known everywhere once it is known at
    three ranks. These lie far apart, so that costs which were rounded to integers are right to one unit.
    """
    return quadratic(lambda rank: factored_cost(method, layer, rank), ranks, layer.cost_model.affine)


def quadratic(cost_at: Callable[[int], Cost], ranks: Sequence[int], is_quadratic: bool = True) -> list[Cost]:
    """The costs at many ranks, of which a function gives each; it is called for three where they are quadratic."""
    if not is_quadratic or len(ranks) <= 3:
        return list(map(cost_at, ranks))
    a, b, c = ranks[0], ranks[len(ranks) // 2], ranks[-1]
    costs = list(map(cost_at, (a, b, c)))
    prices = [(cost.params, cost.macs, cost.bytes) for cost in costs]
    whole = (b - a) * (c - b) * (c - a)  # Lagrange's weights times this are integers
    found = []
    for rank in ranks:
        weights = (
            (rank - b) * (rank - c) * (c - b),
            -(rank - a) * (rank - c) * (c - a),
            (rank - a) * (rank - b) * (b - a),
        )
        sums = (sum(w * price for w, price in zip(weights, each, strict=True)) for each in zip(*prices, strict=True))
        found.append(Cost(*((2 * total + whole) // (2 * whole) for total in sums)))
    return found


def smaller_ranks(method: Method, layer: Candidate, limit: int) -> range:
    """The ranks from 1 to ``limit`` at which the factored layer has fewer parameters than the dense one."""
    one, two = (factored_cost(method, layer, rank).params for rank in (1, 2))
    if two > one:  # a layer that has no rank 2 builds rank 1 in its place
        limit = min(limit, (layer.before.params - 1 - one) // (two - one) + 1)
    return range(1, (limit if one < layer.before.params else 0) + 1)


def spread(top: int, steps: int, round_to: int = 1) -> list[int]:
    """About ``steps`` ranks, multiples of a number and evenly spread up to ``top``, and powers of two below it."""
    if round_to == 1:
        found = {max(1, round(top * k / steps)) for k in range(1, steps + 1)}
    else:
        found = {round_to * round(top * k / steps / round_to) for k in range(1, steps + 1)}
        found |= {2**k for k in range((round_to - 1).bit_length())}
    return sorted(rank for rank in found if 1 <= rank <= top)


def is_rounded(rank: Any, round_to: int) -> bool:
    """Whether all integers of a rank are multiples of a number, or powers of two below it."""
    ranks = rank if isinstance(rank, tuple) else (rank,)
    return all(each % round_to == 0 or (each < round_to and each & (each - 1) == 0) for each in ranks)
