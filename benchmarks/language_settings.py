"""Ways to choose ranks and factors of a model of text: published ones and ours, each a setting of one pipeline."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lowrank_layers as lr

PAIRS = [lr.SVDMethod()]
SINGLE = [method for method in lr.METHODS.values() if not getattr(method, "on_request", False)]
"""The methods of single layers: the default without hidden units."""
JOINT = [lr.HiddenUnitsMethod(), lr.AttentionHeadsMethod()]


@dataclass(frozen=True)
class Setting:
    """One row of the tables.

    Args:
        knows: what the plan and the factors are told of the data.
        units: how layers are compared; ``"uniform"`` gives all one ratio, ``None`` is the default.
        sequential: whether layers are fitted one after the other.
        methods: ``None`` for those of :func:`make_plan`.
    """

    knows: str
    units: Any
    sequential: bool = False
    methods: Any = None


DEFAULT = "**default: two-sided, absolute, all methods**"
SETTINGS = {
    "plain SVD, uniform": Setting("nothing", "uniform", methods=PAIRS),
    "whitened, uniform": Setting("inputs", "uniform", methods=PAIRS),
    "whitened, relative": Setting("inputs", "relative", methods=PAIRS),
    "two-sided, uniform": Setting("gradients", "uniform", methods=PAIRS),
    "two-sided, balanced": Setting("gradients", "balanced", methods=PAIRS),
    "two-sided, balanced, sequential": Setting("gradients", "balanced", sequential=True, methods=PAIRS),
    "two-sided, absolute": Setting("gradients", "absolute", methods=PAIRS),
    "two-sided, measured": Setting("gradients", "measured", methods=PAIRS),
    "hidden units and heads alone": Setting("gradients", "absolute", methods=JOINT),
    "two-sided, absolute, all methods but hidden units": Setting("gradients", "absolute", methods=SINGLE),
    DEFAULT: Setting("gradients", None),
    "default with batches: two-sided, measured, all methods": Setting("gradients", "measured"),
    "default, sequential": Setting("gradients", None, sequential=True),
}


def uniform_plan(model: Any, stats: lr.Statistics | None, fraction: float, skip: Sequence[str]) -> lr.Plan:
    """The plan that gives every layer the largest rank whose factors, and bias, keep the fraction of its parameters."""
    plan = lr.make_plan(model, rank=1, stats=stats, methods=PAIRS, skip=skip)
    for entry in list(plan):
        out, into = model.get_submodule(entry.name).weight.shape
        bias = entry.after.params - out - into
        plan.set_rank(entry.name, max(1, int((fraction * entry.before.params - bias) / (out + into))))
    return plan


def compressed(
    model: Any,
    setting: Setting,
    stats: lr.Statistics,
    batches: list[Any],
    fraction: float,
    effects: dict[str, Any],
    skip: Sequence[str],
) -> Any:
    """A copy of the model at a size, by one setting; layers are measured once, and ``effects`` keeps what was found."""
    known = {
        "nothing": lambda: None,
        "inputs": lambda: replace(stats, layers={k: each.changed(gradients=None) for k, each in stats.items()}),
        "gradients": lambda: stats,
    }[setting.knows]()
    if setting.units == "uniform":
        plan = uniform_plan(model, known, fraction, skip)
    else:
        budget = lr.Budget(params=fraction, of="planned")
        measured_by = "all" if setting.methods is None else "pairs"
        seen: dict[str, Any] = {"units": setting.units}
        if setting.units == "measured" and measured_by in effects:
            seen["effects"] = effects[measured_by]
        elif setting.units == "measured":
            seen["batches"] = batches
        plan = lr.make_plan(model, budget, known, setting.methods, skip, **seen)
        if plan.effects:
            effects[measured_by] = plan.effects
    data = batches if setting.sequential else None
    return lr.factorize_(copy.deepcopy(model), plan, stats=known, data=data)
