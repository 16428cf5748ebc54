"""Factorizing a model further: factored layers are planned anew, and truncated where that is smaller."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...calibrate import Loss, calibrate
from ...layers import is_factored, layer_cost
from ...modules import Selector, replace_
from ...rank import Budget
from ..densify import densify_
from ..entry import Entry
from ..factorize import factorize_
from ..make_plan import make_plan
from ..method import Method
from ..plan import Plan
from ..registry import DENSE, usual_methods


def factorize_further_(
    model: nn.Module,
    budget: Budget,
    batches: Sequence[Any],
    curvature: Loss | None,
    methods: Sequence[Method] | None,
    skip: Iterable[Selector],
    optimizer: torch.optim.Optimizer,
) -> Plan:
    """Factorizes a model that may be factored already, in place; returns the plan of the whole model.

    The factors are multiplied out and planned as the dense layers that they stand for. A layer that the plan makes no
    smaller than it is stays as it is.

    Args:
        model: the model.
        budget: the limit; a fraction is one of the dense model.
        batches: what the model is calibrated on.
        curvature: the loss whose curvature weights the errors of layers; ``None`` weights by their inputs alone.
        methods: as in :func:`make_plan`.
        skip: layers to leave alone.
        optimizer: the optimizer of the model; moments of what is truncated go on.
    """
    dense = densify_(copy.deepcopy(model))
    stats = calibrate(dense, batches, loss=curvature)
    plan = make_plan(dense, budget, stats, usual_methods() if methods is None else methods, skip)
    smaller = [entry for entry in plan if _is_smaller(entry, model, budget)]
    factorize_(dense, Plan(smaller, settings=plan.settings), stats)
    replace_(model, {entry.name: dense.get_submodule(entry.name) for entry in smaller}, optimizer)
    return plan


def _is_smaller(entry: Entry, model: nn.Module, budget: Budget) -> bool:
    """Whether a layer takes less by the plan than it does now, of all that is limited and can be counted."""
    if entry.method == DENSE:
        return False
    modules = dict(model.named_modules(remove_duplicate=False))
    if entry.name not in modules or not is_factored(modules[entry.name]):
        return True
    now = layer_cost(modules[entry.name], entry.input_shape)
    now = replace(now, macs=round(now.macs * entry.repeats))
    units = [unit for unit in budget.units if unit != "latency"] or ["params"]
    pairs = [(getattr(entry.after, unit), getattr(now, unit)) for unit in units]
    return all(then <= held for then, held in pairs) and any(then < held for then, held in pairs)
