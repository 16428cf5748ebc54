"""Applying a plan to a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..calibrate import calibrate, check_batches
from ..calibrate.statistics import Statistics, check_statistics
from ..errors import LowRankError
from ..layers import bias_of, is_compressed, is_int8, weight_of
from ..layers.config import describe
from ..linalg import check_tensor
from ..modules import check_model, check_optimizer, opened_attentions, reasons_to_keep, replace_, walk_layers
from .build import build_layer, write_
from .candidates import Candidate
from .grouped import adopt_sizes_, check_group, cut_groups_, kept_units
from .planned_layers import PlannedLayers
from .refinement import RefinementSettings, refine_
from .registry import DENSE
from .sequential import build_in_sequence


def factorize_(
    model: nn.Module,
    plan: PlannedLayers,
    stats: Statistics | None = None,
    data: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rectified: bool = False,
    refine: RefinementSettings | int | None = None,
    progress: bool = False,
) -> nn.Module:
    """Replaces the layers of a model as the plan says, in place; all is checked and built before anything changes.

    With ``data`` the layers are regressed in sequence: in forward order, each one is fitted to give, on what the
    compressed layers before it deliver, the outputs of the dense model; layers that stay dense are refitted too. How
    far it follows the dense model is chosen on a quarter of the batches that is held out, or of the rows of a single
    batch, so that a layer with few rows per column keeps near its own outputs, or to its fit in one shot.

    Args:
        model: a trained model.
        plan: the :class:`Plan` that :func:`make_plan` returned for it.
        stats: what :func:`calibrate` returned for it; they weight the approximation.
        data: the batches that :func:`calibrate` takes, in the same form.
        optimizer: the optimizer of the model; it is given the new parameters in the place of the old ones, and keeps
            the state (momentum...) of biases and of layers that stay. A plan with a method over several layers takes
            none: make it afterwards.
        rectified: with ``data``, fits a factored layer that a ReLU follows, behind a batch norm or not, to what passes
            the ReLU: outputs that are cut off in the dense model may be anything that is cut off (Zhang et al., 2016).
            It takes about twice the time and pays where little is kept: ResNet-20 with 20 % of its parameters keeps
            84.5 % of CIFAR-10's test images right in place of 82.8 %.
        refine: with ``data``, trains the stages of the compressed model as :func:`refine_` does: its settings, or the
            number of epochs. Meanwhile there is a copy of the model.
        progress: shows a progress bar.

    Returns:
        The model.

    Raises:
        LowRankError: if the plan or the statistics are for another model, a weight is not finite, the model is
            wrapped, or a batch is bad, or for ``refine`` without ``data``; the model is bit-identical then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> batches = [torch.randn(100, 64)]
        >>> stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats)
        >>> type(lr.factorize_(model, plan, stats=stats, data=batches)[0]).__name__
        'PivotLinear'
    """
    check_model(model)
    check_optimizer(optimizer, "factorize_")
    if refine is not None:
        _refined_(model, plan, stats, data, optimizer, rectified, refine, progress)
    else:
        _factorize_(model, plan, stats, data, optimizer, rectified, progress)
    adopt_sizes_(model, plan)
    return model


def _factorize_(
    model: nn.Module,
    plan: PlannedLayers,
    stats: Statistics | None,
    data: Iterable[Any] | None,
    optimizer: torch.optim.Optimizer | None,
    rectified: bool,
    progress: bool,
) -> dict[str, Any]:
    """Replaces and cuts the layers of a model, and returns what stays in groups of layers."""
    with opened_attentions(model):
        _check_plan(model, plan, stats, optimizer)
        kept = kept_units(model, plan, stats)
        if data is None:
            built = _one_shot(model, plan, stats, kept)
        else:
            check_batches(data, "factorize_")
            batches = data if isinstance(data, (list, tuple)) else list(data)
            if not batches:
                raise LowRankError("factorize_: got no batches in data.")
            known = stats or calibrate(model, batches)
            built = build_in_sequence(model, plan, known, batches, rectified, progress, kept=kept)
        for name, new in built.items():
            dense = model.get_submodule(name)
            new.train(dense.training)  # they were built in eval mode
            if not is_compressed(new):
                write_(dense, weight_of(new), bias_of(new))
    replace_(model, {name: new for name, new in built.items() if is_compressed(new)}, optimizer)
    cut_groups_(model, plan, kept)
    return kept


def _refined_(
    model: nn.Module,
    plan: PlannedLayers,
    stats: Statistics | None,
    data: Iterable[Any] | None,
    optimizer: torch.optim.Optimizer | None,
    rectified: bool,
    refine: RefinementSettings | int,
    progress: bool,
) -> None:
    """Factorizes and refines a copy, to which the model is the dense one, and takes over what came of it."""
    if data is None:
        raise LowRankError(
            f"factorize_: got refine={refine!r} and no data, expected the batches on which the model is refined."
        )
    check_batches(data, "factorize_")
    batches = data if isinstance(data, (list, tuple)) else list(data)
    for entry in plan if isinstance(plan, PlannedLayers) and optimizer is not None else ():
        if entry.is_grouped:
            check_group(model, entry, plan, stats, optimizer)
    small = copy.deepcopy(model)
    kept = _factorize_(small, plan, stats, batches, None, rectified, progress)
    refine_(small, model, batches, refine, progress=progress)
    cut_groups_(model, plan, kept)
    planned = {entry.name: small.get_submodule(entry.name) for entry in plan if not entry.stays}
    replace_(model, planned, optimizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(small.get_parameter(name))


def _one_shot(
    model: nn.Module, plan: PlannedLayers, stats: Statistics | None, kept: Mapping[str, Any]
) -> dict[str, nn.Module]:
    built: dict[str, nn.Module] = {}
    for entry in plan:
        if entry.name in kept:
            assert stats is not None
            dense = model.get_submodule(entry.name)
            known, what = stats[entry.name], kept[entry.name]
            built[entry.name] = entry.group.reduced(entry.name, dense, known, plan.damping, what)
        elif entry.is_replaced:
            dense, own = model.get_submodule(entry.name), None if stats is None else stats[entry.name]
            built[entry.name] = build_layer(dense, entry, own, plan.damping)
    return built


def _check_plan(
    model: nn.Module, plan: PlannedLayers, stats: Statistics | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raises for everything that can be wrong, before anything is built."""
    if not isinstance(plan, PlannedLayers):
        raise LowRankError(
            f"factorize_: got plan of type {type(plan).__name__}, expected a Plan; call make_plan first."
        )
    if stats is not None:
        check_statistics(stats, "factorize_")
    layers = dict(walk_layers(model))
    reasons = reasons_to_keep(model)
    for entry in plan:
        module = layers.get(entry.name)
        if module is None:
            raise LowRankError(f"the plan has a layer {entry.name!r}, but the model has not: it is for another model.")
        if is_compressed(module):
            what = "stored in int8" if is_int8(module) else "factored"
            raise LowRankError(f"{entry.name!r} is {what} already; densify_ the model first, or plan anew.")
        if entry.stays:
            continue
        if entry.name in reasons:
            raise LowRankError(f"{entry.name!r} cannot be replaced: {reasons[entry.name]}.")
        if entry.is_grouped:
            check_group(model, entry, plan, stats, optimizer)
        elif entry.method != DENSE and not entry.built_by().matches(Candidate(module)):
            raise LowRankError(
                f"{entry.name!r}: the method {entry.method!r} does not take a {type(module).__name__};"
                " the plan is for another model."
            )
        if describe(module) != entry.layer:
            raise LowRankError(
                f"{entry.name!r}: the plan was made for {entry.layer}, the model has {describe(module)}; plan anew."
            )
        if stats is not None and entry.name not in stats and not entry.is_grouped:
            raise LowRankError(f"{entry.name!r}: the statistics do not know it; calibrate this model.")
        if not entry.is_grouped or entry.name in entry.group.planned:  # not a batch norm
            check_tensor(weight_of(module), f"{entry.name!r}")
        if entry.bits is not None:
            entry.with_bits(entry.bits)  # raises for a layer that cannot be stored in int8
