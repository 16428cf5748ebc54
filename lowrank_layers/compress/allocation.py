"""One option for each layer under one budget, with the least loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..cost import Cost
from ..errors import BudgetError
from ..layers.config import describe
from ..rank import Budget, allocate_within, amount
from ..rank.least_worst import allocate_least_worst
from .alds import spectral_errors
from .candidates import Candidate
from .entry import Entry
from .int8 import int8_options
from .method import Method, Option, is_rounded
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


def offers_for(layer: Candidate, methods: Iterable[Method], bits: int | None = None) -> list[Offer]:
    """Dense first, then everything that any method offers, and some of it in int8; the energy is known afterwards."""
    offers = [Offer(None, Option(None, layer.before, 0.0))]
    for method in methods:
        if method.matches(layer):
            options = method.options(layer)
            rounded = [option for option in options if is_rounded(option.rank, layer.round_to)]
            offers += [Offer(method, option) for option in rounded or options]
    if bits is not None:
        floating = [(offer.method, offer.option) for offer in offers]
        offers += [Offer(method, option) for method, option in int8_options(layer, floating)]
    layer.tails  # noqa: B018 - the energy is asked for once all layers are known
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
        bits=offer.option.bits,
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
        effects: measured over predicted loss of each layer, by which its options' losses have been scaled; 1 elsewhere.
        prior: the units that measured ones are combined with.
    """

    layers: dict[str, Candidate]
    offers: dict[str, list[Offer]]
    budget: Budget
    total: Cost
    units: Units
    alds: bool = False
    effects: Mapping[str, float] = field(default_factory=dict)
    prior: Units = "absolute"

    def solve(self) -> dict[str, Offer]:
        """The choice with the least sum of losses, or largest error, under the budget; idle layers become smallest.

        Under a limit on the loss it is the choice of least cost, of the first cost that is limited too, or parameters.

        Raises:
            BudgetError: if not even the smallest options fit, or no choice that keeps all limits is found.
        """
        left = self._left()
        picks = {name: self.smallest(name, left) for name, layer in self.layers.items() if layer.idle}
        used = [name for name in self.layers if name not in picks]
        costs, capacities = [], []
        for unit, limit in left.items():
            costs.append([[getattr(offer.option.cost, unit) for offer in self.offers[name]] for name in used])
            capacities.append(limit - sum(getattr(self.offers[name][k].option.cost, unit) for name, k in picks.items()))
        if self.budget.loss is not None:
            costs.append([[offer.option.loss_increase for offer in self.offers[name]] for name in used])
            capacities.append(self.budget.loss)
        objective = [self.objective(name) for name in used]
        if self.alds:
            found = allocate_least_worst(costs[0], objective, int(capacities[0]))
        else:
            found = allocate_within(costs, objective, capacities)
        picks.update(zip(used, found, strict=True))
        return {name: self.offers[name][picks[name]] for name in self.layers}

    def smallest(self, name: str, left: dict[str, float]) -> int:
        """Returns the position of the option of a layer that takes the least part of the limits.

        Args:
            name: the layer.
            left: the part of each limit that is left for the planned layers.
        """
        limits = left or {"params": 1.0}
        sizes = [
            sum(getattr(offer.option.cost, unit) / max(limit, 1e-12) for unit, limit in limits.items())
            for offer in self.offers[name]
        ]
        return sizes.index(min(sizes))

    def objective(self, name: str) -> list[float]:
        """Returns what is minimised, for each option of one layer.

        Args:
            name: the layer.
        """
        layer, offers = self.layers[name], self.offers[name]
        if self.alds:
            return spectral_errors(layer, [offer.option for offer in offers])
        if self.budget.loss is not None:
            unit = (*self.budget.units, "params")[0]
            return [float(getattr(offer.option.cost, unit)) for offer in offers]
        return self.comparable(layer, [offer.option.loss_increase for offer in offers], self.effects.get(name, 1.0))

    def comparable(self, layer: Candidate, losses: Iterable[float], effect: float) -> list[float]:
        """Returns losses in the units of the problem.

        Args:
            layer: the layer whose losses they are.
            losses: the losses of its options.
            effect: measured over predicted loss, by which they have been scaled.
        """
        return comparable(layer, losses, self.units, prior=self.prior, effect=effect)

    def limits(self) -> dict[str, float]:
        """The limits on costs as counts and seconds, and the one on the loss."""
        loss = {} if self.budget.loss is None else {"loss": self.budget.loss}
        return {**self.budget.limits(self.whole), **loss}

    def excess(self, unit: str) -> float:
        """By how much the dense model exceeds the limit on a cost; negative where it stays below."""
        return float(getattr(self.whole, unit) - self.limits()[unit])

    @property
    def planned(self) -> Cost:
        """Cost of the layers that may change."""
        return sum((offers[0].option.cost for offers in self.offers.values()), Cost())

    @property
    def whole(self) -> Cost:
        """Cost of everything that the budget limits."""
        return self.planned if self.budget.of == "planned" else self.total

    def _left(self) -> dict[str, float]:
        """The part of each limit on a cost that is left for the planned layers."""
        planned, whole, left = self.planned, self.whole, {}
        for unit, limit in self.budget.limits(whole).items():
            fixed = getattr(whole, unit) - getattr(planned, unit)
            least = fixed + sum(
                min(getattr(offer.option.cost, unit) for offer in offers) for offers in self.offers.values()
            )
            if least > limit:
                raise self.too_small(unit, limit, least, fixed)
            left[unit] = limit - fixed
        return left

    def too_small(self, unit: str, limit: float, least: float, fixed: float) -> BudgetError:
        """The error that says how small the model can become.

        Args:
            unit: what is limited.
            limit: the limit.
            least: what the smallest options take with all the rest.
            fixed: what the rest takes.
        """
        what, belong = ("this model", f", of which {amount(fixed, unit)} belong to layers that no method touches")
        if self.budget.of == "planned":
            what, belong = "the planned layers", ""
        return BudgetError(
            f"{self.budget} means {amount(limit, unit)}, but the smallest {what} can become is {amount(least, unit)}"
            f" ({least / getattr(self.whole, unit):.1%}){belong}. Raise the budget, or skip fewer layers."
        )

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
        spared = "macs" in self.budget.units or sum(lost) <= HARDLY_ANYTHING * len(self.layers)
        return faster if spared else picks

    def entries(self, picks: dict[str, Offer]) -> list[Entry]:
        """The lines of the plan, with the estimated relative error of each layer's output."""
        entries = []
        for name, offer in picks.items():
            energy = self.layers[name].energy * self.effects.get(name, 1.0)
            error = (offer.option.loss_increase / energy) ** 0.5 if energy > 0 else 0.0
            loss = None if self.layers[name].idle else offer.option.loss_increase
            before = self.offers[name][0].option.cost
            entries.append(replace(entry_for(name, self.layers[name], offer, error), before=before, loss=loss))
        return entries
