"""From a model and a budget to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from ..calibrate.statistics import Statistics
from ..cost import Cost
from ..errors import BudgetError, LowRankError
from ..layers import linear_shape, weight_of
from ..layers.config import describe
from ..linalg import full_precision
from ..modules.attention import unfused
from ..modules.replace import Selector, select
from ..modules.tree import check_model, walk_layers
from ..rank import Budget, Rank, allocate, as_budget, check_rank
from .candidates import UNREACHED, Candidate, candidates
from .entry import Entry
from .methods import METHODS, Method, Option
from .methods.base import factored_cost, has_bias, repeated_cost
from .plan import Plan, model_cost
from .units import Units, check_units, comparable, default_units

HARDLY_ANYTHING = 0.01
"""Mean share of the layers' outputs that may be lost without a loss of accuracy. ResNet-20 without CP at 70 / 50 / 30 %
of its parameters: 0.8 / 2.3 / 6.6 %; CP gains nothing that can be measured at 70 %, a point at 50 % and 5 at 30 %."""


def make_plan(
    model: nn.Module,
    budget: Budget | None = None,
    stats: Statistics | None = None,
    methods: Sequence[Method] | None = None,
    skip: Iterable[Selector] = (),
    *,
    rank: Rank | None = None,
    units: Units | None = None,
    progress: bool = False,
) -> Plan:
    r"""Chooses, for every layer, a method and a rank, or to leave it dense, under one budget; exactly.

    Every method offers options with a cost and an estimated growth of the loss; a multiple-choice knapsack picks
    at most one a layer. With statistics the estimate is the curvature-weighted error of the layer's output,
    :math:`\tfrac12 \|G^{1/2} (W - \hat W) X^{1/2}\|^2`; without, that of its weight.

    ``units`` says how the estimates of different layers compare:

    - ``"absolute"`` takes them as they are: right where the quadratic estimate can be trusted.
    - ``"relative"`` divides by the layer's total, as whitening methods do: a guard against estimates that are off by
      a factor.
    - ``"balanced"`` divides by the square root of the total, halfway between in the logarithm. It is the default with
      gradients of a loss: on ResNet-20 with channel SVD alone the three give 87.86 / 87.75 / 88.04 % at half the
      parameters and 74.66 / 75.89 / 76.34 % at 30 %; with all methods 91.24 / 91.19 / 91.06 % and 88.37 / 88.89 /
      88.85 %. It is also the default where nothing is known.
    - ``"trimmed"`` divides by the total without the largest 1 % of the layer's singular directions, and squares the
      quotient. It is the default where the inputs are known but no gradients. A few outlier channels own the inputs
      of a transformer's layers, so that by the other units these layers are cut to almost nothing; and errors of
      several layers compound, so that one large error costs more than two half as large. On a sentence model, ResNet-20
      and LeNet it is nowhere below one ratio for all layers (``benchmarks/without_loss.py``).

    Args:
        model: a trained model; it is not changed.
        budget: the limit on the whole model, or on the layers that may change (``of="planned"``).
        stats: what :func:`calibrate` returned for this model; without it weights are approximated plainly.
        methods: by default all of ``METHODS``, without CP where it would make the model slower than the dense one (by
            :attr:`Plan.time_ratio`) and the budget is one of MACs, or the other methods lose at most 1 % of the
            layers' outputs. Name the methods to have them all: ``methods=list(lr.METHODS.values())``.
        skip: layers to leave alone: names, ends of names, parents, types or predicates.
        rank: instead of a budget: one rank or rule for every layer, by the first method that matches. A rule sees
            the weighted spectrum where there are statistics. A layer that would grow is left dense.
        units: ``"absolute"``, ``"relative"``, ``"balanced"`` or ``"trimmed"``; by default ``"trimmed"``
            with statistics without gradients, ``"balanced"`` otherwise.
        progress: shows a progress bar over the layers.

    Returns:
        The plan: print it, edit it, save it, apply it with :func:`factorize_`.

    Raises:
        BudgetError: if not even the smallest options fit; the message says what can be reached.
        LowRankError: for a wrapped model, a ``skip`` that matches nothing, or nothing to factorize.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5))
        >>> plan.after.params <= 0.5 * plan.total.params
        True
    """
    check_model(model)
    if (budget is None) == (rank is None):
        raise BudgetError("make_plan: expected either a budget, as in Budget(params=0.3), or rank=.")
    check_units(units)
    chosen = _check_methods(methods)
    if budget is not None and as_budget(budget).unit == "macs" and stats is None:
        raise BudgetError(
            "a budget of MACs needs to know the sizes of the inputs: pass stats=calibrate(model, batches)."
        )
    closed = list(walk_layers(model))
    with unfused(model):
        asked = select(model, skip, "skip", closed)
        return _plan(model, budget, stats, chosen, asked, rank, units, progress, methods is None)


@full_precision
def _plan(
    model: nn.Module,
    budget: Budget | None,
    stats: Statistics | None,
    methods: Sequence[Method],
    asked: set[str],
    rank: Rank | None,
    units: Units | None,
    progress: bool,
    by_default: bool,
) -> Plan:
    if stats is not None:
        _check_stats(model, stats)
    layers, skipped = candidates(model, methods, asked, stats)
    if not layers:
        why = (
            "; ".join(f"{name!r}: {reason}" for name, reason in skipped.items())
            or "it has no linear layer, convolution or table"
        )
        raise LowRankError(f"make_plan: nothing to factorize: {why}.")
    total = model_cost(model) + Cost(macs=_model_macs(model, stats))
    if rank is not None:
        check_rank(rank, "make_plan")
        entries = [_by_rule(name, layer, methods, rank) for name, layer in layers.items()]
        return Plan(entries, skipped=skipped, total=total, settings={"rank": repr(rank)})
    assert budget is not None
    bar = tqdm(layers.items(), desc="make_plan", disable=not progress)
    tables = {name: layer.options(methods) for name, layer in bar}
    units = units or default_units(layers.values())
    picks = _solve(layers, tables, budget, total, units)
    if by_default:
        picks = _without_slow(layers, tables, picks, budget, total, units)
    entries = _entries(layers, tables, picks)
    settings = {
        "budget": {budget.unit: getattr(budget, budget.unit), "of": budget.of},
        "units": units,
        "calibrated": stats is not None,
    }
    notes = {name: UNREACHED for name, layer in layers.items() if layer.idle}
    return Plan(entries, skipped=skipped, notes=notes, total=total, settings=settings)


def _without_slow(
    layers: dict[str, Candidate],
    tables: dict[str, list[tuple[str, Option]]],
    picks: dict[str, int],
    budget: Budget,
    total: Cost,
    units: Units,
) -> dict[str, int]:
    """The picks without CP, where those with it are slower than the dense model and gain nothing for it.

    They gain nothing where the others lose hardly anything, or where the budget is one of speed.
    """
    if all(tables[name][pick][0] != "cp" for name, pick in picks.items()):
        return picks
    ratio = Plan(_entries(layers, tables, picks)).time_ratio
    if ratio is None or ratio <= 1:
        return picks
    others = {name: [k for k, (method, _) in enumerate(table) if method != "cp"] for name, table in tables.items()}
    try:
        fewer = {name: [table[k] for k in others[name]] for name, table in tables.items()}
        faster = {name: others[name][k] for name, k in _solve(layers, fewer, budget, total, units).items()}
    except BudgetError:
        return picks
    lost = [entry.error**2 for entry in _entries(layers, tables, faster) if entry.error and not layers[entry.name].idle]
    spared = budget.unit == "macs" or sum(lost) <= HARDLY_ANYTHING * len(layers)
    return faster if spared else picks


def _entries(
    layers: dict[str, Candidate], tables: dict[str, list[tuple[str, Option]]], picks: dict[str, int]
) -> list[Entry]:
    entries = []
    for name, layer in layers.items():
        method, option = tables[name][picks[name]]
        error = (option.loss_increase / layer.energy) ** 0.5 if layer.energy > 0 else 0.0
        entries.append(_entry(name, layer, method, option.rank, option.cost, error))
    return entries


def _solve(
    layers: dict[str, Candidate],
    tables: dict[str, list[tuple[str, Option]]],
    budget: Budget,
    total: Cost,
    units: Units,
) -> dict[str, int]:
    """The option of each layer, by its index: the least sum of losses under the budget."""
    unit = budget.unit
    planned = sum((layer.before for layer in layers.values()), Cost())
    whole = planned if budget.of == "planned" else total
    fixed = getattr(whole, unit) - getattr(planned, unit)
    costs = {name: [getattr(option.cost, unit) for _, option in tables[name]] for name in layers}
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
    picks = {name: costs[name].index(min(costs[name])) for name, layer in layers.items() if layer.idle}
    spent = fixed + sum(costs[name][pick] for name, pick in picks.items())
    used = [name for name in layers if name not in picks]
    losses = [comparable(layers[name], (o.loss_increase for _, o in tables[name]), units) for name in used]
    return picks | dict(zip(used, allocate([costs[name] for name in used], losses, limit - spent), strict=True))


def _by_rule(name: str, layer: Candidate, methods: Sequence[Method], rule: Rank) -> Entry:
    method = next(m for m in methods if m.matches(layer.module))
    rank = method.choose(layer.module, layer.stats, rule)
    cost = factored_cost(method, layer.module, rank, layer.stats)
    if not isinstance(rule, int) and cost.params > layer.before.params + len(weight_of(layer.module)):
        return _entry(name, layer, "dense", None, layer.before, 0.0)
    return _entry(name, layer, method.name, rank, cost, None)


def _entry(name: str, layer: Candidate, method: str, rank: Any, cost: Cost, error: float | None) -> Entry:
    stats = layer.stats
    return Entry(
        name,
        method,
        rank,
        layer.before,
        cost,
        error,
        describe(layer.module),
        has_bias(layer.module, stats),
        None if stats is None else stats.input_shape,
        1.0 if stats is None else stats.repeats,
    )


def _check_methods(methods: Sequence[Method] | None) -> list[Method]:
    if methods is None:
        return list(METHODS.values())
    known = {type(method) for method in METHODS.values()}
    for method in methods:
        if type(method) not in known:
            names = ", ".join(sorted(f"{kind.__name__}()" for kind in known))
            raise LowRankError(f"make_plan: got method {method!r}, expected instances such as {names}.")
    if not methods:
        raise LowRankError("make_plan: got no methods; leave methods=None for all of them.")
    return list(methods)


def _check_stats(model: nn.Module, stats: Statistics) -> None:
    if not isinstance(stats, Statistics):
        raise LowRankError(f"got stats of type {type(stats).__name__}, expected what calibrate returned.")
    unknown = [name for name in stats if name not in dict(walk_layers(model))]
    if unknown:
        raise LowRankError(f"the statistics know {unknown[0]!r}, which this model has not; calibrate this model.")
    layers = dict(walk_layers(model))
    for name, each in stats.items():
        seen, expected = each.inputs.mean.shape[-1], linear_shape(layers[name])[2]
        if seen != expected:
            raise LowRankError(
                f"{name!r}: got statistics of {seen} inputs for a layer of {expected}; calibrate this model, not"
                " another one."
            )


def _model_macs(model: nn.Module, stats: Statistics | None) -> int:
    """MACs of every layer of the dense model that can be counted."""
    if stats is None:
        return 0
    return stats.other_macs + sum(
        repeated_cost(module, stats[name]).macs for name, module in walk_layers(model) if name in stats
    )
