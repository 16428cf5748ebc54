"""One option for each layer, or for layers together, under one budget, with the least loss.

Which groups of layers take an option together is decided by a multiplier: with a price on what is limited, a group does
where its best option together, loss and price, is below the sum of the best ones of its layers by themselves. The price
is the least one that keeps the limits. Then one option per layer or group is chosen exactly, as without groups, and the
result is never worse than the choice without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..cost import Cost
from ..errors import BudgetError
from ..rank import allocate_within
from .allocation import Allocation, Offer
from .bundles import Bundle
from .entry import Entry

STEPS = 80
"""Halvings, on a logarithmic scale, of the range of prices."""
RANGE = (1e-18, 1e9)
"""Prices of a whole limit that are tried, over the sum of the largest losses."""


@dataclass(frozen=True)
class _Item:
    """The options of a layer or of a bundle.

    Args:
        costs: for each limit, the part of it that each option takes.
        losses: what is minimised.
    """

    costs: list[list[float]]
    losses: list[float]

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        """Both as tensors."""
        return torch.tensor(self.costs, dtype=torch.float64), torch.tensor(self.losses, dtype=torch.float64)

    def cheapest(self, prices: Tensor, price: float) -> tuple[float, int]:
        """The least sum of loss and priced costs, and where it is.

        Args:
            prices: the weight of each limit.
            price: what all weights are multiplied with.
        """
        costs, losses = self._tensors
        sums = losses + price * (prices @ costs)
        position = int(sums.argmin())
        return float(sums[position]), position


class JointAllocation:
    """The problem of a plan with methods over several layers.

    Args:
        base: the problem without them.
        bundles: the groups of layers with their options.
    """

    def __init__(self, base: Allocation, bundles: Sequence[Bundle]) -> None:
        self._base, self._bundles = base, bundles
        planned = base.planned
        limits = base.budget.limits(base.whole)
        self._fixed = {unit: getattr(base.whole, unit) - getattr(planned, unit) for unit in limits}
        self._limits = limits
        left = {unit: limit - self._fixed[unit] for unit, limit in limits.items()}
        self._idle = {
            name: base.offers[name][base.smallest(name, left)] for name, layer in base.layers.items() if layer.idle
        }
        self._capacities: list[float] = [
            limit - sum(getattr(offer.option.cost, unit) for offer in self._idle.values())
            for unit, limit in left.items()
        ]
        self._singles = {name: self._single(name) for name in base.layers if name not in self._idle}
        self._together = [self._item(bundle) for bundle in bundles]
        if base.budget.loss is not None:
            self._capacities.append(base.budget.loss)

    def solve(self) -> list[Entry]:
        """Returns the lines of the plan, in the order of the layers.

        Raises:
            BudgetError: if no choice that keeps all limits is found.
        """
        best: tuple[float, dict[str, int], dict[int, int]] | None = None
        bounds = self._sets()
        for taken, bound in bounds.items():
            if best is not None and bound >= best[0]:
                continue
            try:
                found = self._solve(taken)
            except BudgetError:
                continue
            if best is None or found[0] < best[0]:
                best = found
        if best is None:
            raise self._too_small(next(iter(bounds)))
        return self._entries(*best[1:])

    def _sets(self) -> dict[frozenset[int], float]:
        """The sets of bundles that are tried, with what they lose at least by the price.

        They are those on both sides of the price that keeps the limits, and none.
        """
        prices = torch.tensor([1 / max(float(capacity), 1e-12) for capacity in self._capacities], dtype=torch.float64)
        items = [*self._singles.values(), *self._together]
        unit = sum(max(item.losses) for item in items) or 1.0
        low, high = (unit * end for end in RANGE)
        for _ in range(STEPS):
            price = (low * high) ** 0.5
            if self._keeps(self._taken(prices, price), prices, price):
                high = price
            else:
                low = price
        sets = dict.fromkeys([self._taken(prices, high), self._taken(prices, low), frozenset[int]()])
        return {taken: self._least(taken, prices, high) for taken in sets}

    def _least(self, taken: frozenset[int], prices: Tensor, price: float) -> float:
        """What any choice within the limits loses at least: its loss and priced costs are above the cheapest ones."""
        return sum(item.cheapest(prices, price)[0] for item in self._items(taken)) - price * len(prices)

    def _taken(self, prices: Tensor, price: float) -> frozenset[int]:
        """The bundles that gain by an option together, of those with a layer in common the ones that gain most."""
        own = {name: item.cheapest(prices, price)[0] for name, item in self._singles.items()}
        gains = {}
        for index, (bundle, item) in enumerate(zip(self._bundles, self._together, strict=True)):
            gains[index] = sum(own[name] for name in bundle.planned) - item.cheapest(prices, price)[0]
        chosen, layers = [], set[str]()
        for index in sorted(gains, key=lambda index: -gains[index]):
            if gains[index] > 0 and not layers & self._bundles[index].planned:
                chosen.append(index)
                layers |= self._bundles[index].planned
        return frozenset(chosen)

    def _left_alone(self, taken: frozenset[int]) -> list[str]:
        """The layers that are in none of these bundles."""
        inside = {name for index in taken for name in self._bundles[index].planned}
        return [name for name in self._singles if name not in inside]

    def _items(self, taken: frozenset[int]) -> list[_Item]:
        """What is chosen from: these bundles, and the layers that are in none of them."""
        return [self._singles[name] for name in self._left_alone(taken)] + [self._together[index] for index in taken]

    def _keeps(self, taken: frozenset[int], prices: Tensor, price: float) -> bool:
        """Whether the choice at a price keeps all limits."""
        items = self._items(taken)
        picks = [item.cheapest(prices, price)[1] for item in items]
        sums = [
            sum(item.costs[unit][pick] for item, pick in zip(items, picks, strict=True))
            for unit in range(len(self._capacities))
        ]
        return all(total <= capacity for total, capacity in zip(sums, self._capacities, strict=True))

    def _solve(self, taken: frozenset[int]) -> tuple[float, dict[str, int], dict[int, int]]:
        """The sum of losses, and the options of layers and of bundles, if these take one together."""
        names, indices = self._left_alone(taken), sorted(taken)
        items = [self._singles[name] for name in names] + [self._together[index] for index in indices]
        costs = [[item.costs[unit] for item in items] for unit in range(len(self._capacities))]
        found = allocate_within(costs, [item.losses for item in items], self._capacities)
        total = sum(item.losses[pick] for item, pick in zip(items, found, strict=True))
        count = len(names)
        return (
            total,
            dict(zip(names, found[:count], strict=True)),
            dict(zip(indices, found[count:], strict=True)),
        )

    def _entries(self, singles: dict[str, int], together: dict[int, int]) -> list[Entry]:
        """The lines of the plan; the first option of a bundle leaves all of its layers dense."""
        base = self._base
        picks: dict[str, Offer] = dict(self._idle)
        picks |= {name: base.offers[name][pick] for name, pick in singles.items()}
        lines: dict[str, Entry] = {}
        for index, pick in together.items():
            bundle = self._bundles[index]
            if pick:
                lines |= {entry.name: entry for entry in bundle.entries(pick - 1)}
            else:
                picks |= {name: base.offers[name][0] for name in bundle.planned}
        lines |= {entry.name: entry for entry in base.entries(picks)}
        ordered: list[Entry] = []
        for name in base.layers:
            entry = lines[name]
            group = entry.group if entry.is_grouped else None
            if group is not None and name == group.leaders[0]:
                ordered += [lines[other] for other in group.layers if other not in group.planned]
            ordered.append(entry)
        return ordered

    def _single(self, name: str) -> _Item:
        """The options of one layer."""
        offers = self._base.offers[name]
        losses = [offer.option.loss_increase for offer in offers]
        costs = [offer.option.cost for offer in offers]
        return self._priced(costs, losses, self._base.objective(name))

    def _item(self, bundle: Bundle) -> _Item:
        """The options of a bundle, dense first."""
        base = self._base
        whole = {name: base.offers[name][0].option.cost for name in bundle.planned}
        totals = [bundle.total(costs, only_planned=base.budget.of == "planned") for costs in bundle.costs]
        curves = [[0.0, *curve] for curve in zip(*bundle.losses, strict=True)]
        leaders = [base.layers[name] for name in bundle.leaders]
        scaled = list(map(base.comparable, leaders, curves, bundle.effects))
        sums, objective = ([sum(each) for each in zip(*lists, strict=True)] for lists in (curves, scaled))
        costs = [sum(whole.values(), Cost()), *totals]
        if base.budget.loss is not None:
            unit = (*base.budget.units, "params")[0]
            objective = [float(getattr(cost, unit)) for cost in costs]
        return self._priced(costs, sums, objective)

    def _priced(self, costs: Sequence[Cost], losses: list[float], objective: list[float]) -> _Item:
        """Options by what is limited."""
        parts: list[list[float]] = [[getattr(cost, unit) for cost in costs] for unit in self._limits]
        return _Item(parts if self._base.budget.loss is None else [*parts, losses], objective)

    def _too_small(self, taken: frozenset[int]) -> BudgetError:
        """The error that says how small the model can become."""
        items = self._items(taken)
        for k, (unit, limit) in enumerate(self._limits.items()):
            idle = sum(getattr(offer.option.cost, unit) for offer in self._idle.values())
            least = self._fixed[unit] + idle + sum(min(item.costs[k]) for item in items)
            if least > limit:
                return self._base.too_small(unit, limit, least, self._fixed[unit])
        return BudgetError(f"{self._base.budget}: found no choice that keeps all limits; raise one of them.")
