"""Ranks by the measured score of the model with one layer compressed at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from ..calibrate.statistics import Statistics
from ..checks import is_number
from ..cost import Cost
from ..errors import BudgetError, LowRankError
from ..modules import Selector
from ..rank import Budget, one_limit
from ..rank.least_worst import allocate_least_worst
from ..rank.size import ParameterFraction
from .entry import Entry
from .factorize import factorize_
from .isotonic import rising
from .make_plan import make_plan
from .method import Method
from .plan import Plan
from .registry import DENSE


def plan_by_validation(
    model: nn.Module,
    budget: Budget,
    score: Callable[[nn.Module], float],
    *,
    stats: Statistics | None = None,
    methods: Sequence[Method] | None = None,
    skip: Iterable[Selector] = (),
    ratios: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
    progress: bool = False,
) -> Plan:
    """Chooses ranks by how far the model's score falls when each layer alone is compressed.

    A copy of the model is scored with one layer at one ratio, for every layer and ratio. Each layer's scores are made
    monotone in its cost (the nearest such values in least squares, isotonic regression), and one threshold is
    bisected: every layer takes its cheapest option whose score stays above it, and the threshold is the highest that
    fits the budget. (The greedy selection of AIMET, and ASVD's search by sensitivity; Yuan et al., 2023.) It
    takes ``layers * ratios`` evaluations and assumes nothing of the loss; :func:`make_plan` takes none.

    Args:
        model: a trained model; it is not changed.
        budget: the limit, one of parameters, multiply-accumulates or bytes.
        score: gets a model and returns its score, larger ones being better, such as the accuracy on held-out data. It
            is called without gradients.
        stats: what :func:`calibrate` returned for this model, so that approximations are weighted.
        methods: the methods to choose from; each layer is given to the first one that matches.
        skip: layers to leave alone, as in :func:`make_plan`.
        ratios: fractions of each layer's parameters to try, in (0, 1].
        progress: shows a progress bar over the evaluations.

    Returns:
        The plan, as of :func:`make_plan`.

    Raises:
        BudgetError: if not even the smallest ratios fit.
        LowRankError: for what :func:`make_plan` refuses, and a score that is no finite number.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> inputs = torch.randn(50, 64)
        >>> dense = model(inputs).detach()
        >>> plan = lr.plan_by_validation(model, lr.Budget(params=0.5), lambda m: -(m(inputs) - dense).norm().item())
        >>> plan.after.params <= 0.5 * plan.total.params
        True
    """
    budget = one_limit(budget, "plan_by_validation")
    (unit,) = budget.units
    if unit == "macs" and stats is None:
        raise BudgetError("plan_by_validation: a budget of MACs needs stats=calibrate(model, batches).")
    if not ratios:
        raise LowRankError("plan_by_validation: got no ratios, expected fractions such as (0.2, 0.5).")
    skip = list(skip)
    plans = [make_plan(model, None, stats, methods, skip, rank=ParameterFraction(ratio)) for ratio in sorted(ratios)]
    dense = _score(score, model)
    offers = {entry.name: _offers(entry.name, plans) for entry in plans[0]}
    bar = tqdm(total=sum(map(len, offers.values())), desc="plan_by_validation", disable=not progress)
    costs, errors = [], []
    for entries in offers.values():
        scores = []
        for entry in entries:
            alone = Plan([entry], settings=plans[0].settings)
            changed = entry.method != DENSE
            scores.append(_score(score, factorize_(copy.deepcopy(model), alone, stats)) if changed else dense)
            bar.update()
        costs.append([getattr(entry.after, unit) for entry in entries])
        errors.append([dense - value for value in rising([*scores, dense])[:-1]])
    bar.close()
    before = sum((entries[-1].before for entries in offers.values()), Cost())
    whole = before if budget.of == "planned" else plans[0].total
    limits = budget.limits(whole)
    capacity = int(limits[unit]) - getattr(whole, unit) + getattr(before, unit)
    picks = allocate_least_worst(costs, errors, capacity)
    chosen = [entries[pick] for entries, pick in zip(offers.values(), picks, strict=True)]
    settings = {**plans[0].settings, "budget": budget.to_dict(), "limits": limits}
    del settings["rank"]
    return Plan(chosen, skipped=plans[0].skipped, total=plans[0].total, settings=settings)


def _offers(name: str, plans: Sequence[Plan]) -> list[Entry]:
    """What the layer becomes at every ratio, each rank once, the cheapest first; and dense."""
    entries = {entry.rank: entry for entry in (plan[name] for plan in plans) if entry.method != DENSE}
    first = plans[0][name]
    dense = Plan([first]).drop(name)[name]
    return [*entries.values(), dense]


@torch.no_grad()
def _score(score: Callable[[nn.Module], float], model: nn.Module) -> float:
    value = score(model)
    if not is_number(value) or not math.isfinite(value):
        raise LowRankError(f"plan_by_validation: the score returned {value!r}, expected a finite number.")
    return float(value)
