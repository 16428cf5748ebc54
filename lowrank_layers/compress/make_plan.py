"""From a model and a budget to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Literal

from torch import nn
from tqdm import tqdm

from ..calibrate.statistics import Statistics
from ..cost import Cost
from ..errors import BudgetError, LowRankError
from ..layers import linear_shape, weight_of
from ..linalg import full_precision
from ..linalg.nonnegative import check_choice
from ..modules import Selector, check_model, opened_attentions, select, walk_layers
from ..rank import Budget, Rank, as_budget, check_rank, one_limit
from .allocation import Allocation, Offer, entry_for, offers_for
from .candidates import Candidate
from .cost_model import CostModel, CountedCost
from .damping import Damping
from .eligible import UNREACHED, eligible_layers
from .entry import Entry
from .method import Method, Option, factored_cost
from .methods.svd import SVDMethod
from .plan import Plan, model_cost
from .registry import METHODS, check_registered
from .request import Request
from .units import Units, check_units, default_units


def make_plan(
    model: nn.Module,
    budget: Budget | None = None,
    stats: Statistics | None = None,
    methods: Sequence[Method] | None = None,
    skip: Iterable[Selector] = (),
    *,
    rank: Rank | None = None,
    units: Units | None = None,
    allocation: Literal["knapsack", "alds"] = "knapsack",
    damping: Damping | None = None,
    cost_model: CostModel | None = None,
    progress: bool = False,
) -> Plan:
    r"""Chooses a method and a rank for every layer, or leaves it dense, so that the loss grows least under a budget.

    Every method offers options with a cost and an estimated growth of the loss; the multiple-choice knapsack problem,
    one option per layer, is solved exactly. With statistics the estimate is the curvature-weighted error of the
    layer's output, :math:`\tfrac12 \|G^{1/2} (W - \hat W) X^{1/2}\|^2`; without, that of its weight.

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
        budget: the limits on the whole model, or on the layers that may change (``of="planned"``).
        stats: what :func:`calibrate` returned for this model; without it weights are approximated plainly.
        methods: by default all of ``METHODS``, without CP where it would make the model slower than the dense one (by
            :attr:`Plan.time_ratio`) and the budget is one of MACs, or the other methods lose at most 1 % of the
            layers' outputs. Name the methods to have them all: ``methods=list(lr.METHODS.values())``.
        skip: layers to leave alone: names, ends of names, parents, types or predicates.
        rank: instead of a budget: one rank or rule for every layer, by the first method that matches. A rule sees
            the weighted spectrum where there are statistics. A layer that would grow is left dense.
        units: ``"absolute"``, ``"relative"``, ``"balanced"`` or ``"trimmed"``; by default ``"trimmed"``
            with statistics without gradients, ``"balanced"`` otherwise.
        allocation: ``"knapsack"``, the least sum of losses, or ``"alds"``, the least of the largest relative error of a
            layer in the spectral norm, of pairs of factors (Liebenwein et al., 2021; without its subspaces). The second
            one looks at the worst input and not at the loss; it is there to compare with. It takes ``methods`` with
            nothing but an ``SVDMethod``, which is its default, and no ``units``.
        damping: ridges on the moments in the statistics, by default ``Damping()``; the plan keeps them for
            :func:`factorize_`.
        cost_model: prices layers and options; by default parameters, multiply-accumulates and bytes are counted.
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
    check_choice(allocation, ("knapsack", "alds"), "make_plan", "allocation")
    if allocation == "alds":
        methods = _methods_of_alds(methods, units, rank)
        budget = one_limit(budget, "make_plan with allocation='alds'")
    request = _request(methods, stats, damping, cost_model)
    if budget is not None:
        _check_budget(as_budget(budget), stats)
    closed = list(walk_layers(model))
    with opened_attentions(model):
        skipped_names = select(model, skip, "skip", closed)
        if stats is not None:
            _check_stats(model, stats)
        layers, skipped = eligible_layers(model, request, skipped_names)
        if not layers:
            why = (
                "; ".join(f"{name!r}: {reason}" for name, reason in skipped.items())
                or "it has no linear layer, convolution or embedding"
            )
            raise LowRankError(f"make_plan: nothing to factorize: {why}.")
        total = _total(model, request, layers)
        weighting = {} if stats is None else {"damping": asdict(request.damping)}
        if rank is not None:
            check_rank(rank, "make_plan")
            entries = _by_rule(layers, request.methods, rank)
            return Plan(entries, skipped=skipped, total=total, settings={"rank": repr(rank), **weighting})
        assert budget is not None
        offers = _offers(layers, request.methods, progress)
        scales = units or default_units(layers.values())
        problem = Allocation(layers, offers, budget, total, scales, alds=allocation == "alds")
        picks = problem.solve_without_slow() if methods is None else problem.solve()
        return Plan(
            problem.entries(picks),
            skipped=skipped,
            notes={name: UNREACHED for name, layer in layers.items() if layer.idle},
            total=total,
            settings={
                "budget": budget.to_dict(),
                "limits": problem.limits(),
                **({"allocation": "alds"} if problem.alds else {"units": problem.units}),
                "calibrated": stats is not None,
                **weighting,
            },
        )


@full_precision
def _offers(layers: dict[str, Candidate], methods: Sequence[Method], progress: bool) -> dict[str, list[Offer]]:
    bar = tqdm(layers.items(), desc="make_plan", disable=not progress)
    return {name: offers_for(layer, methods) for name, layer in bar}


@full_precision
def _by_rule(layers: dict[str, Candidate], methods: Sequence[Method], rule: Rank) -> list[Entry]:
    """The plan's lines where every layer is given one rank or rule, by the first method that matches."""
    entries = []
    for name, layer in layers.items():
        method = next(m for m in methods if m.matches(layer))
        rank = method.choose(layer, rule)
        layer.release()
        offer, error = Offer(method, Option(rank, factored_cost(method, layer, rank), 0.0)), None
        if not isinstance(rule, int) and offer.option.cost.params > layer.before.params + len(weight_of(layer.module)):
            offer, error = Offer(None, Option(None, layer.before, 0.0)), 0.0
        entries.append(entry_for(name, layer, offer, error))
    return entries


def _methods_of_alds(methods: Sequence[Method] | None, units: Units | None, rank: Rank | None) -> Sequence[Method]:
    """The one method whose options have the error that ALDS compares, or an error that names the remedy."""
    if rank is not None or units is not None:
        raise LowRankError("make_plan: got allocation='alds' with rank= or units=, expected a budget alone.")
    chosen = [SVDMethod()] if methods is None else methods
    if not all(isinstance(method, SVDMethod) for method in chosen):
        raise LowRankError(f"make_plan: got allocation='alds' with methods={chosen!r}, expected [SVDMethod()].")
    return chosen


def _request(
    methods: Sequence[Method] | None,
    stats: Statistics | None,
    damping: Damping | None,
    cost_model: CostModel | None,
) -> Request:
    """The arguments of make_plan that concern single layers, checked and with their defaults."""
    if methods is not None and not methods:
        raise LowRankError("make_plan: got no methods; leave methods=None for all of them.")
    chosen = METHODS.values() if methods is None else map(check_registered, methods)
    damping = Damping() if damping is None else damping
    if not isinstance(damping, Damping):
        raise LowRankError(f"make_plan: got damping={damping!r}, expected a Damping, as in Damping(inputs=1e-3).")
    cost_model = CountedCost() if cost_model is None else cost_model
    if not callable(getattr(cost_model, "cost", None)) or not hasattr(cost_model, "affine"):
        raise LowRankError(f"make_plan: got cost_model={cost_model!r}, expected a CostModel such as CountedCost().")
    return Request(tuple(chosen), stats, damping, cost_model)


def _check_budget(budget: Budget, stats: Statistics | None) -> None:
    """Raises for limits on what is not known."""
    if budget.macs is not None and stats is None:
        raise BudgetError(
            "a budget of MACs needs to know the sizes of the inputs: pass stats=calibrate(model, batches)."
        )
    if budget.loss is not None and (stats is None or all(each.gradients is None for each in stats.values())):
        raise BudgetError(
            "a limit on the growth of the loss needs gradients of a loss: pass"
            " stats=calibrate(model, batches, loss=SampledCrossEntropy()), or the loss that the model was trained with."
        )


def _check_stats(model: nn.Module, stats: Statistics) -> None:
    if not isinstance(stats, Statistics):
        raise LowRankError(f"got stats of type {type(stats).__name__}, expected what calibrate returned.")
    layers = dict(walk_layers(model))
    for name, each in stats.items():
        if name not in layers:
            raise LowRankError(f"the statistics know {name!r}, which this model has not; calibrate this model.")
        seen, expected = each.inputs.mean.shape[-1], linear_shape(layers[name])[2]
        if seen != expected:
            raise LowRankError(
                f"{name!r}: got statistics of {seen} inputs for a layer of {expected}; calibrate this model, not"
                " another one."
            )


def _total(model: nn.Module, request: Request, layers: dict[str, Candidate]) -> Cost:
    """Cost of the whole dense model: planned layers by the cost model, all the rest by count."""
    stats, counted = request.stats, CountedCost()
    total = model_cost(model)
    if stats is not None:
        macs = [counted.cost(module, stats[name]).macs for name, module in walk_layers(model) if name in stats]
        total += Cost(macs=stats.other_macs + sum(macs))
    for layer in layers.values():
        total += layer.before - counted.cost(layer.module, layer.stats)
    return total
