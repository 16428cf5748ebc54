"""From a model and a budget to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

from torch import nn
from tqdm import tqdm

from ..calibrate.statistics import Statistics, check_statistics
from ..checks import check_integer
from ..cost import Cost
from ..errors import BudgetError, LowRankError
from ..layers import weight_of
from ..linalg import full_precision
from ..linalg.nonnegative import check_choice
from ..modules import Selector, check_model, opened_attentions, select, walk_layers
from ..rank import Budget, Rank, as_budget, check_rank, one_limit
from .allocation import Allocation, Offer, entry_for, offers_for
from .bundles import find_members, make_bundles
from .candidates import Candidate
from .cost_model import CostModel, CountedCost
from .damping import Damping
from .effects import Effects, KnownEffects, measured_on
from .eligible import UNREACHED, eligible_layers
from .entry import Entry
from .group_method import GroupMethod
from .joint_allocation import JointAllocation
from .latency import ExampleRun, LatencyTable, fit_latency
from .measured import MeasuredEffects, scaled
from .method import Method, Option, factored_cost
from .plan import Plan, model_cost
from .registry import UsualMethods
from .request import (
    Request,
    check_budget,
    check_groups,
    check_int8,
    check_stats,
    make_request,
    methods_of_alds,
    methods_of_uniform,
    usual_groups,
)
from .units import Units, check_units, default_units

ROUND_TO = 4
"""Ranks are multiples of it under a limit on latency."""


def make_plan(
    model: nn.Module,
    budget: Budget | None = None,
    stats: Statistics | None = None,
    methods: Sequence[Method | GroupMethod] | None = None,
    skip: Iterable[Selector] = (),
    *,
    rank: Rank | None = None,
    units: Units | None = None,
    allocation: Literal["knapsack", "alds"] = "knapsack",
    damping: Damping | None = None,
    cost_model: CostModel | None = None,
    example: Any = None,
    round_to: int | None = None,
    batches: Iterable[Any] | None = None,
    effects: Mapping[str, float] | None = None,
    bits: int | None = None,
    uniform: bool = False,
    progress: bool = False,
) -> Plan:
    r"""Chooses a method and a rank for every layer, or leaves it dense, so that the loss grows least under a budget.

    Every method offers options with a cost and an estimated growth of the loss; the multiple-choice knapsack problem,
    one option per layer, is solved exactly. With statistics the estimate is the curvature-weighted error of the
    layer's output, :math:`\tfrac12 \|G^{1/2} (W - \hat W) X^{1/2}\|^2`; without, that of its weight.

    Under a limit on latency, layers and what may replace them are timed inside the running model on this machine, and
    these times are kept in ``~/.cache/lowrank_layers``. In the end the compressed model is timed beside the dense one,
    and the plan says what was predicted and what was measured. Where latency is the only limit, a layer is replaced
    only where that is faster.

    ``units`` says how the estimates of different layers compare:

    - ``"absolute"`` takes them as they are: right where the quadratic estimate can be trusted. It is the default with
      gradients of a model that reads tokens: SmolLM2 with 80 / 60 / 40 % of its blocks, in pairs of factors, has a
      perplexity of 48.1 / 104 / 321 on WikiText-2, and of 60.7 / 149 / 558 with ``"balanced"`` units.
    - ``"relative"`` divides by the layer's total, as whitening methods do: a guard against estimates that are off by
      a factor.
    - ``"balanced"`` divides by the square root of the total, halfway between in the logarithm. It is the default with
      gradients of other models: on ResNet-20 with channel SVD alone the three give 87.86 / 87.75 / 88.04 % at half the
      parameters and 74.66 / 75.89 / 76.34 % at 30 %; with all methods 91.24 / 91.19 / 91.06 % and 88.37 / 88.89 /
      88.85 %. It is also the default where nothing is known.
    - ``"measured"`` measures beside assuming, and holds with ``batches`` and ``effects``: each layer alone
      is replaced at about half of its parameters, what comes after it in the model is run again on some batches, and
      the layer's whole curve is scaled by measured over estimated growth of the loss. What is measured is how far the
      output moves: the mean divergence of the predictions where the loss of the statistics is a cross-entropy or the
      output has ``.logits``, softened by a temperature of 4 where the dense ones are nearly certain, and its squared
      error over its variance otherwise. The losses of the plan are in these units then. Layers compare by the
      geometric mean of what is measured and of what the units by default estimate, since a few batches of one text err
      too: SmolLM2 with 80 % of its blocks, by all methods in one shot, has a perplexity of 35.9 / 16.5 / 10.3 on
      WikiText-2, code and stories, and with 40 % of 81.7 / 203 / 48; by what is measured alone of 36.2 / 17.5 / 10.7
      and 80.8 / 262 / 47; and with ``"absolute"`` units of 36.4 / 16.0 / 10.4 at 80 %.
    - ``"trimmed"`` divides by the total without the largest 1 % of the layer's singular directions, and squares the
      quotient. It is the default where the inputs are known but no gradients. A few outlier channels own the inputs
      of a transformer's layers, so that by the other units these layers are cut to almost nothing; and errors of
      several layers compound, so that one large error costs more than two half as large. On a sentence model, ResNet-20
      and LeNet it is nowhere below one ratio for all layers (``benchmarks/without_loss.py``).

    Args:
        model: a trained model; it is not changed.
        budget: the limits on the whole model, or on the layers that may change (``of="planned"``).
        stats: what :func:`calibrate` returned for this model; without it weights are approximated plainly.
        methods: by default all of ``METHODS`` but those on request, such as :class:`TensorizedLinearMethod`, and
            without CP where it would make the model slower than the dense one (by :attr:`Plan.time_ratio`) and the
            budget is one of MACs, or the other methods lose at most 1 % of the layers' outputs. Name the methods to
            have them: ``methods=list(lr.METHODS.values())``. Methods over several layers compete with these:
            :class:`HiddenUnitsMethod` by default in models that read tokens, where gradients are known and latency is
            not limited, and :class:`AttentionHeadsMethod` where it is named too. The layers of a group take what such a
            method offers them together, or options of their own, whichever loses less under the budget.
        skip: layers to leave alone: names, ends of names, parents, types or predicates.
        rank: instead of a budget: one rank or rule for every layer, by the first method that matches. A rule sees
            the weighted spectrum where there are statistics. A layer that would grow is left dense.
        units: ``"absolute"``, ``"relative"``, ``"balanced"``, ``"trimmed"`` or ``"measured"``; by default
            ``"measured"`` with ``batches``, else ``"trimmed"`` with statistics without gradients, ``"absolute"`` with
            gradients of a model that reads tokens, and ``"balanced"`` otherwise.
        allocation: ``"knapsack"``, the least sum of losses, or ``"alds"``, the least of the largest relative error of a
            layer in the spectral norm, of pairs of factors (Liebenwein et al., 2021; without its subspaces). The second
            one looks at the worst input and not at the loss; it is there to compare with. It takes ``methods`` with
            nothing but an ``SVDMethod``, which is its default, and no ``units``.
        damping: ridges on the moments in the statistics, by default ``Damping.default(stats)``; the plan keeps them
            for :func:`factorize_`.
        cost_model: prices layers and options; by default parameters, multiply-accumulates and bytes are counted.
        example: under a limit on latency, the batch whose forward pass is timed, in the form that :func:`calibrate`
            takes; ``None`` takes the first sample that it saw.
        round_to: ranks are multiples of it, or powers of two below it; ``None`` stands for 4 under a limit on latency,
            since processors compute several channels at a time, and for 1 otherwise.
        batches: what layers are measured on: batches that the model was calibrated on, in the same form. About 1,024
            positions of the output are looked at, of batches that are evenly spaced.
        effects: in the place of ``batches``, what was measured for an earlier plan of this model, at any budget, by the
            same methods: ``earlier.effects``.
        bits: 8 offers linear layers and embeddings, and their factors, in int8 too, under a limit on bytes. The loss of
            such an offer includes that of rounding, in the same units, so that the plan chooses rank and bits together.
            What is stored in int8 is not trained afterwards. ``None`` leaves all in floating point.
        uniform: takes only methods over several layers, by default all of them, and lets layers that are alike keep one
            size. A model of transformers is one that its configuration describes after :func:`factorize_`, so that
            ``save_pretrained`` writes a folder that is read without this library.
        progress: shows a progress bar over the layers.

    Returns:
        The plan: print it, edit it, save it, apply it with :func:`factorize_`.

    Raises:
        BudgetError: if not even the smallest options fit; the message says what can be reached.
        LowRankError: for a wrapped model, a ``skip`` that matches nothing, nothing to factorize, or ``bits`` without a
            limit on bytes.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5))
        >>> plan.after.params <= 0.5 * plan.total.params
        True
        >>> plan = lr.make_plan(model, lr.Budget(bytes=0.2), bits=8)
        >>> plan["0"].label, plan["2"].label
        ('svd int8', 'dense int8')
    """
    check_model(model)
    if (budget is None) == (rank is None):
        raise BudgetError("make_plan: expected either a budget, as in Budget(params=0.3), or rank=.")
    if stats is not None:
        check_statistics(stats, "make_plan")
    check_units(units)
    check_choice(allocation, ("knapsack", "alds"), "make_plan", "allocation")
    if allocation == "alds":
        methods = methods_of_alds(methods, units, rank)
        budget = one_limit(budget, "make_plan with allocation='alds'")
    if uniform:
        methods = methods_of_uniform(methods, bits)
    timed = budget is not None and check_budget(as_budget(budget), stats, example).latency is not None
    if round_to is None:
        round_to = ROUND_TO if timed else 1
    check_integer(round_to, "make_plan", "round_to", 1)
    check_int8(bits, budget, allocation)
    planned = budget is not None and allocation == "knapsack"
    together = usual_groups(stats) if planned and not timed else ()
    request = make_request(methods, stats, damping, cost_model, round_to, together)
    check_groups(request, budget, timed)
    seen = measured_on(batches, units, effects, planned=planned)
    closed = list(walk_layers(model))
    with opened_attentions(model):
        skipped_names = select(model, skip, "skip", closed)
        if stats is not None:
            check_stats(model, stats)
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
        competing = {name: [m for m in request.methods if m.matches(layer)] for name, layer in layers.items()}
        if timed:
            run = ExampleRun(
                stats.example if example is None and stats is not None else example,
                stats is not None and stats.with_target,
            )
            table = LatencyTable(model, run, layers)
            if len(budget.units) == 1:
                competing = table.faster(request.methods)
        members = find_members(model, request, layers, dict(closed), uniform=uniform)
        known = None if effects is None else KnownEffects(effects, layers)
        with nullcontext(known) if seen is None else MeasuredEffects(model, seen, stats) as measuring:
            offers, found = _offers(layers, competing, measuring, bits, progress)
            bundles = make_bundles(model, members, request, measuring, found, uniform=uniform)
        reads_tokens = stats is not None and stats.reads_tokens
        prior = default_units(layers.values(), reads_tokens=reads_tokens)
        scales = units or ("measured" if found else prior)
        problem = Allocation(layers, offers, budget, total, scales, allocation == "alds", found, prior)
    measured: dict[str, float] = {}
    if timed:
        problem, picks, measured["measured"] = fit_latency(model, problem, table)
    else:
        unnamed = methods is None or isinstance(methods, UsualMethods)
        picks = {} if bundles else problem.solve_without_slow() if unnamed else problem.solve()
    return Plan(
        JointAllocation(problem, bundles).solve() if bundles else problem.entries(picks),
        skipped=skipped,
        notes={name: UNREACHED for name, layer in layers.items() if layer.idle},
        total=problem.total,
        settings={
            "budget": budget.to_dict(),
            "limits": problem.limits(),
            **({"allocation": "alds"} if problem.alds else {"units": problem.units}),
            "calibrated": stats is not None,
            **({} if bits is None else {"bits": bits}),
            **({"uniform": True} if uniform else {}),
            **weighting,
            **({"effects": found} if found else {}),
            **measured,
        },
    )


@full_precision
def _offers(
    layers: dict[str, Candidate],
    methods: dict[str, list[Method]],
    measuring: Effects | None,
    bits: int | None,
    progress: bool,
) -> tuple[dict[str, list[Offer]], dict[str, float]]:
    """The options of all layers, with measured losses where they are measured, and what scaled them."""
    offers, effects = {}, {}
    for name, layer in tqdm(layers.items(), desc="make_plan", disable=not progress):
        offers[name] = offers_for(layer, methods[name], bits)
        if measuring is not None:
            effects[name] = measuring.effect(name, layer, offers[name])
            offers[name] = scaled(offers[name], effects[name])
        layer.release()
    return offers, effects


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
