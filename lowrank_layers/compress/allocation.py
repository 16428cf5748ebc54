"""One option for each layer under one budget, with the least loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..cost import Cost
from ..errors import BudgetError
from ..layers.config import describe
from ..rank import Budget, allocate
from ..rank.least_worst import allocate_least_worst
from .alds import spectral_errors
from .candidates import Candidate
from .entry import Entry
from .method import Method, Option
from .plan import Plan
from .registry import DENSE, settings_of
from .units import Units, comparable

HARDLY_ANYTHING = 0.01
"""Mean share of the layers' outputs that may be lost without a loss of accuracy. ResNet-20 without CP at 70 / 50 / 30 %
of its parameters: 0.8 / 2.3 / 6.6 %; CP gains nothing that can be measured at 70 %, a point at 50 % and 5 at 30 %."""


@dataclass(frozen=True)
class Offer:
    """An option and the method that makes it; no method leaves the layer dense."""

    method: Method | None
    option: Option

    @property
    def name(self) -> str:
        """The method's name in a plan."""
        return DENSE if self.method is None else self.method.name


def offers_for(layer: Candidate, methods: Iterable[Method]) -> list[Offer]:
    """Dense first, then everything that any method offers. Afterwards the layer holds no big matrices."""
    offers = [Offer(None, Option(None, layer.before, 0.0))]
    offers += [Offer(method, option) for method in methods if method.matches(layer) for option in method.options(layer)]
    layer.tails  # noqa: B018 - the energy is asked for once all layers are known
    layer.release()
    return offers


def entry_for(name: str, layer: Candidate, offer: Offer, error: float | None) -> Entry:
    """The line of the plan by which a layer takes an offer."""
    stats = layer.stats
    return Entry(
        name,
        offer.name,
        offer.option.rank,
        layer.before,
        offer.option.cost,
        error,
        describe(layer.module),
        layer.has_bias,
        None if stats is None else stats.input_shape,
        1.0 if stats is None else stats.repeats,
        {} if offer.method is None else settings_of(offer.method),
    )


@dataclass(frozen=True)
class Allocation:
    """The multiple-choice knapsack problem of a plan.

    Args:
        layers: the layers by name.
        offers: the options of each layer, dense first.
        budget: the limit.
        total: cost of the whole dense model.
        units: how the losses of different layers compare.
        alds: minimises the largest relative error of a layer in the spectral norm, not the sum of losses.
    """

    layers: dict[str, Candidate]
    offers: dict[str, list[Offer]]
    budget: Budget
    total: Cost
    units: Units
    alds: bool = False

    def solve(self) -> dict[str, Offer]:
        """The choice with the least sum of losses, or largest error, under the budget; idle layers become smallest.

        Raises:
            BudgetError: if not even the smallest options fit.
        """
        unit = self.budget.unit
        costs = {name: [getattr(offer.option.cost, unit) for offer in offers] for name, offers in self.offers.items()}
        left = self._left_for(costs)
        picks = {name: costs[name].index(min(costs[name])) for name, layer in self.layers.items() if layer.idle}
        left -= sum(costs[name][pick] for name, pick in picks.items())
        used = [name for name in self.layers if name not in picks]
        losses = [self._losses(self.layers[name], [offer.option for offer in self.offers[name]]) for name in used]
        choose = allocate_least_worst if self.alds else allocate
        picks.update(zip(used, choose([costs[name] for name in used], losses, left), strict=True))
        return {name: self.offers[name][picks[name]] for name in self.layers}

    def _losses(self, layer: Candidate, options: list[Option]) -> list[float]:
        """What is minimised, for each option of one layer."""
        if self.alds:
            return spectral_errors(layer, options)
        return comparable(layer, [option.loss_increase for option in options], self.units)

    def _left_for(self, costs: dict[str, list[int]]) -> int:
        """The part of the budget that is left for the planned layers."""
        budget, unit = self.budget, self.budget.unit
        planned = sum((layer.before for layer in self.layers.values()), Cost())
        whole = planned if budget.of == "planned" else self.total
        fixed: int = getattr(whole, unit) - getattr(planned, unit)
        limit = budget.limit(whole)
        least = fixed + sum(min(cost) for cost in costs.values())
        if least > limit:
            what, belong = ("this model", f", of which {fixed:,} belong to layers that no method touches")
            if budget.of == "planned":
                what, belong = "the planned layers", ""
            raise BudgetError(
                f"{budget} means {limit:,} {unit}, but the smallest {what} can become is {least:,}"
                f" ({least / getattr(whole, unit):.1%}){belong}. Raise the budget, or skip fewer layers."
            )
        return limit - fixed

    def solve_without_slow(self) -> dict[str, Offer]:
        """The choice without CP, where the choice with CP is slower than the dense model and gains nothing for it.

        It gains nothing where the other methods lose hardly anything, or where the budget is one of speed.
        """
        picks = self.solve()
        if all(offer.name != "cp" for offer in picks.values()):
            return picks
        ratio = Plan(self.entries(picks)).time_ratio
        if ratio is None or ratio <= 1:
            return picks
        others = {name: [offer for offer in offers if offer.name != "cp"] for name, offers in self.offers.items()}
        try:
            faster = replace(self, offers=others).solve()
        except BudgetError:
            return picks
        lost = [entry.error**2 for entry in self.entries(faster) if entry.error and not self.layers[entry.name].idle]
        spared = self.budget.unit == "macs" or sum(lost) <= HARDLY_ANYTHING * len(self.layers)
        return faster if spared else picks

    def entries(self, picks: dict[str, Offer]) -> list[Entry]:
        """The lines of the plan, with the estimated relative error of each layer's output."""
        entries = []
        for name, offer in picks.items():
            energy = self.layers[name].energy
            error = (offer.option.loss_increase / energy) ** 0.5 if energy > 0 else 0.0
            entries.append(entry_for(name, self.layers[name], offer, error))
        return entries
