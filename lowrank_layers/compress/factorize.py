"""Applying a plan, and undoing the factorization."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibrate import calibrate, check_batches, quiet_eval
from ..calibrate.statistics import LayerStats, Statistics
from ..errors import LowRankError
from ..layers import FactoredModule, is_embedding, is_factored, weight_from_matrices, weight_of
from ..layers.config import describe
from ..linalg import check_tensor, full_precision
from ..modules import (
    check_densifiable,
    check_factors,
    check_model,
    check_optimizer,
    open_attentions,
    opened_attentions,
    reasons_to_keep,
    replace_,
    walk_layers,
)
from .candidates import Candidate
from .damping import Damping
from .entry import Entry
from .plan import Plan
from .regression import joint_bias
from .sequential import forward_order, paired_stats


def factorize_(
    model: nn.Module,
    plan: Plan,
    stats: Statistics | None = None,
    data: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    progress: bool = False,
) -> nn.Module:
    """Replaces the layers of a model as the plan says, in place; all is checked and built before anything changes.

    With ``data`` the layers are regressed in sequence: in forward order, each one is fitted to give, on what the
    compressed layers before it deliver, the outputs of the dense model; layers that stay dense are refitted too.

    Args:
        model: a trained model.
        plan: what :func:`make_plan` returned for it.
        stats: what :func:`calibrate` returned for it: weights the approximation.
        data: the batches that :func:`calibrate` takes, in the same form.
        optimizer: its groups are given the new parameters in the place of the old ones.
        progress: shows a progress bar.

    Returns:
        The model.

    Raises:
        LowRankError: if the plan or the statistics are for another model, a weight is not finite, the model is
            wrapped, or a batch is bad; the model is bit-identical then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> batches = [torch.randn(100, 64)]
        >>> stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats)
        >>> type(lr.factorize_(model, plan, stats=stats, data=batches)[0]).__name__
        'LowRankLinear'
    """
    check_model(model)
    check_optimizer(optimizer, "factorize_")
    with opened_attentions(model):
        _check_plan(model, plan, stats)
        refits: dict[str, tuple[Tensor, Tensor | None]] = {}
        if data is None:
            built = _one_shot(model, plan, stats)
        else:
            check_batches(data, "factorize_")
            batches = data if isinstance(data, (list, tuple)) else list(data)
            if not batches:
                raise LowRankError("factorize_: got no batches in data.")
            built, refits = _in_sequence(model, plan, stats or calibrate(model, batches), batches, progress)
        for name, (weight, bias) in refits.items():
            _write(model.get_submodule(name), weight, bias)
        for name, new in built.items():
            new.train(model.get_submodule(name).training)  # they were built in eval mode
    replace_(model, built, optimizer)
    return model


@full_precision
def densify_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Multiplies the factors out: every factored layer becomes the torch layer that computes the same, in place.

    Args:
        model: a model with factored layers; one without comes back as it is.
        optimizer: its groups are given the new parameters in the place of the old ones.

    Raises:
        LowRankError: if a factored layer carries hooks or a forward of its own; nothing is changed then.

    Examples:
        >>> lr.densify_(nn.Sequential(lr.LowRankLinear(8, 4, rank=2)))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    check_model(model)
    check_optimizer(optimizer, "densify_")
    check_factors(model)
    check_densifiable(model)
    factored = {name: module for name, module in walk_layers(model) if isinstance(module, FactoredModule)}
    replace_(model, {name: module.to_dense() for name, module in factored.items()}, optimizer)
    opened = {name: attention for name, attention in open_attentions(model).items() if not any(attention.rank)}
    replace_(model, {name: attention.to_dense() for name, attention in opened.items()}, optimizer)
    return model


def _one_shot(model: nn.Module, plan: Plan, stats: Statistics | None) -> dict[str, nn.Module]:
    built: dict[str, nn.Module] = {}
    for entry in plan:
        if entry.method != "dense":
            known = None if stats is None else stats[entry.name]
            built[entry.name] = _build(model.get_submodule(entry.name), entry, known, plan.damping)
    return built


@full_precision
def _build(dense: nn.Module, entry: Entry, stats: LayerStats | None, damping: Damping) -> FactoredModule:
    if stats is not None:
        stats = replace(stats, free_bias=entry.bias)  # a plan made without statistics counts no new biases
    try:
        return entry.built_by().build(Candidate(dense, stats, damping=damping), entry.rank)
    except LowRankError as error:
        raise type(error)(f"{entry.name!r}: {error}") from None


def _in_sequence(
    model: nn.Module, plan: Plan, stats: Statistics, batches: list[Any] | tuple[Any, ...], progress: bool
) -> tuple[dict[str, nn.Module], dict[str, tuple[Tensor, Tensor | None]]]:
    """The replacements, built one after the other on a copy, and new weights for layers that stay dense."""
    names = [entry.name for entry in plan if entry.name in stats]
    target = stats.with_target
    calls = forward_order(model, names, batches[0], with_target=target)
    work = copy.deepcopy(model).requires_grad_(False)
    built: dict[str, nn.Module] = {}
    refits: dict[str, tuple[Tensor, Tensor | None]] = {}
    order = [*calls, *(entry.name for entry in plan if entry.name not in calls)]
    changed = False
    with quiet_eval(model), quiet_eval(work):
        for name in tqdm(order, desc="factorize", disable=not progress):
            entry, dense = plan[name], model.get_submodule(name)
            layer_stats = stats.get(name)
            regress = layer_stats is not None and name in calls and not is_embedding(dense)
            if regress and changed:
                assert layer_stats is not None
                layer_stats = paired_stats(
                    model, work, name, layer_stats, batches, calls=calls[name], with_target=target, mask=stats.mask
                )
            if entry.method != "dense":
                new = _build(dense, entry, layer_stats, plan.damping)
                replace_(work, {name: copy.deepcopy(new).requires_grad_(False).eval()})
                built[name] = new
                changed = True
            elif regress and changed:
                assert layer_stats is not None
                refits[name] = _refit(dense, layer_stats, plan.damping)
                _write(work.get_submodule(name), *refits[name])
    return built, refits


@full_precision
def _refit(dense: nn.Module, stats: LayerStats, damping: Damping) -> tuple[Tensor, Tensor | None]:
    """The dense layer's best weight and bias on the compressed prefix; without a bias, through the origin."""
    problems = Candidate(dense, replace(stats, free_bias=False), damping=damping).problems
    fulls = [problem.full for problem in problems]
    return weight_from_matrices(dense, torch.stack(fulls)), joint_bias(problems, fulls)


@torch.no_grad()
def _write(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    weight_of(layer).copy_(weight)
    if bias is not None:
        layer.get_parameter("bias").copy_(bias)


def _check_plan(model: nn.Module, plan: Plan, stats: Statistics | None) -> None:
    """Everything that can be wrong is found here, before anything is built."""
    if not isinstance(plan, Plan):
        raise LowRankError(
            f"factorize_: got plan of type {type(plan).__name__}, expected a Plan; call make_plan first."
        )
    if stats is not None and not isinstance(stats, Statistics):
        raise LowRankError(f"factorize_: got stats of type {type(stats).__name__}, expected what calibrate returned.")
    layers = dict(walk_layers(model))
    reasons = reasons_to_keep(model)
    for entry in plan:
        module = layers.get(entry.name)
        if module is None:
            raise LowRankError(f"the plan has a layer {entry.name!r}, but the model has not: it is for another model.")
        if is_factored(module):
            raise LowRankError(f"{entry.name!r} is factored already; densify_ the model first, or plan anew.")
        if entry.method == "dense":
            continue
        if entry.name in reasons:
            raise LowRankError(f"{entry.name!r} cannot be replaced: {reasons[entry.name]}.")
        if not entry.built_by().matches(Candidate(module)):
            raise LowRankError(
                f"{entry.name!r}: the method {entry.method!r} does not take a {type(module).__name__};"
                " the plan is for another model."
            )
        if describe(module) != entry.layer:
            raise LowRankError(
                f"{entry.name!r}: the plan was made for {entry.layer}, the model has {describe(module)}; plan anew."
            )
        if stats is not None and entry.name not in stats:
            raise LowRankError(f"{entry.name!r}: the statistics do not know it; calibrate this model.")
        check_tensor(weight_of(module), f"{entry.name!r}")
