"""Fitting a layer whose outputs pass a rectifier: where the dense output is cut off, any that is cut off will do.

With the dense output ``y``, the fitted one ``a`` and the rectifier's floor 0, the error behind the rectifier is at most
``(z - a')^2`` for every ``a'``, with ``z = y`` where ``y > 0`` and ``z = min(a, 0)`` elsewhere. So one least-squares
fit to ``z`` after the other lowers it (Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification
and Detection", 2016, alternate likewise).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import forward, main_output
from ..calibrate.moments import Moments, sums
from ..calibrate.statistics import LayerStats
from ..layers import FactoredModule, Int8Layer, bias_of, matrices_of, weight_from_matrices
from ..linalg import full_precision, psd_root
from .build import build_layer, write_
from .damping import Damping
from .entry import Entry
from .regression import Metric, add_ridge_, to_diagonal_

PASSES = 3
"""Fits after the first one; on LeNet they bring most of what ten of them bring."""
ROWS, ENTRIES = 65536, 2**25
"""About how many rows of a layer's inputs are looked at, with so many entries at most."""

RowPairs = Sequence[tuple[Tensor, Tensor]]
"""Rows of inputs, ``[count, n]``, in the compressed and in the dense model."""


@dataclass(frozen=True)
class Rectifier:
    """What cuts off a layer's outputs below a floor, or above it where the sign is negative.

    Args:
        floor: where the outputs are cut off, ``[out]``.
        sign: 1, or -1 for outputs that are cut off above, ``[out]``.
    """

    floor: Tensor
    sign: Tensor

    def passed(self, outputs: Tensor) -> Tensor:
        """Returns by how much outputs ``[..., out]`` pass the floor, 0 where they are cut off."""
        return (self.sign * (outputs - self.floor)).clamp_min(0)

    def target(self, dense: Tensor, fitted: Tensor) -> Tensor:
        """Returns the outputs nearest to the fitted ones that are the dense ones behind the rectifier."""
        passed, cut = self.passed(dense), (self.sign * (fitted - self.floor)).clamp_max(0)
        return self.floor + self.sign * torch.where(passed > 0, passed, cut)


@torch.no_grad()
def rectifier_of(model: nn.Module, name: str, batch: Any, *, with_target: bool) -> Rectifier | None:
    """Returns what cuts off a layer's outputs, ``None`` where nothing does.

    It is found by trying: the layer, or the batch norm that takes its outputs, has negative outputs on a batch, and the
    model's output stays the same, bit for bit, if they are set to zero.

    Args:
        model: the dense model, in eval mode.
        name: the layer.
        batch: the batch.
        with_target: whether the last item of a tuple batch is the target.
    """
    layer = model.get_submodule(name)
    holder = layer
    outputs: list[Any] = []

    def follow(norm: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal holder
        if outputs and args[0] is outputs[-1]:
            holder = norm

    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_hook(lambda _, args, output: outputs.append(output)).remove)
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                hooks.callback(norm.register_forward_pre_hook(follow).remove)
        plain = main_output(forward(model, batch, with_target=with_target))
    negative = False

    def cut_off(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal negative
        negative |= bool((output < 0).any())
        return output.relu()

    hook = holder.register_forward_hook(cut_off)
    try:
        cut = main_output(forward(model, batch, with_target=with_target))
    finally:
        hook.remove()
    if plain is None or cut is None or not (negative and torch.equal(plain, cut)):
        return None
    size = matrices_of(layer).shape[:2].numel()
    one, zero = (torch.full((size,), value, device=plain.device) for value in (1.0, 0.0))
    if not isinstance(holder, nn.modules.batchnorm._BatchNorm):
        return Rectifier(zero, one)
    mean, var = holder.running_mean, holder.running_var
    scale, shift = (one, zero) if holder.weight is None else (holder.weight, holder.bias)
    if mean is None or var is None or len(mean) != size or not bool(scale.all()):
        return None
    return Rectifier(mean - shift / scale * (var + holder.eps).sqrt(), scale.sign())


@full_precision
def build_rectified(
    dense: nn.Module, entry: Entry, stats: LayerStats, damping: Damping, rectifier: Rectifier, rows: RowPairs
) -> FactoredModule | Int8Layer:
    """Returns the factored layer of an entry that has the least weighted error behind the rectifier, of all fits.

    Args:
        dense: the dense layer.
        entry: what becomes of it.
        stats: its statistics, with the inputs that the compressed prefix delivers.
        damping: ridges on the moments.
        rectifier: what cuts off its outputs.
        rows: its inputs.
    """
    best = fitted = build_layer(dense, entry, stats, damping)
    least, target = math.inf, copy.deepcopy(dense)
    if entry.bias and bias_of(target) is None:
        target.bias = nn.Parameter(torch.zeros_like(matrices_of(dense)[0, :, 0]))
    inputs = Moments.zeros(len(stats.inputs.mean), stats.inputs.mean.device)
    for ours, _ in rows:
        inputs.update(ours)
    for done in range(PASSES + 1):
        work = fitted.to_dense()
        error, mean, products = _look(dense, work, stats, damping, rectifier, rows)
        if error >= least:
            break
        best, least = fitted, error
        if done < PASSES:
            write_(target, *_least_squares(work, inputs, mean, products, damping))
            fitted = build_layer(target, entry, stats.changed(cross=None, target_mean=None), damping)
    return best


def _look(
    dense: nn.Module, fitted: nn.Module, stats: LayerStats, damping: Damping, rectifier: Rectifier, rows: RowPairs
) -> tuple[float, Tensor, Tensor]:
    """The weighted error behind the rectifier, and ``E[z]`` and ``E[z x'^T]`` of the targets ``z``."""
    metric = Metric.of_outputs(stats, damping, matrices_of(dense).device)
    error, count = 0.0, sum(len(ours) for ours, _ in rows)
    mean = stats.inputs.mean.new_zeros(len(rectifier.floor))
    products = mean.new_zeros(len(mean), len(stats.inputs.mean))
    for ours, theirs in rows:
        wanted, found = _outputs(dense, theirs), _outputs(fitted, ours)
        difference = rectifier.passed(wanted) - rectifier.passed(found)
        weighted = difference if metric is None else metric.times(difference.mT).mT
        error += float((weighted * difference).sum()) / count
        total, product = sums(ours, rectifier.target(wanted, found))
        mean += total.to(mean) / count
        products += product.to(mean) / count
    return error, mean, products


def _least_squares(
    fitted: nn.Module, inputs: Moments, mean: Tensor, products: Tensor, damping: Damping
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the best map to the targets without a limit on the rank; damping pulls to the fitted one."""
    centred = bias_of(fitted) is not None
    moment = inputs.covariance() if centred else inputs.second.clone()
    cross = torch.addr(products, mean, inputs.mean, alpha=-1) if centred else products
    diagonal, share = moment.diagonal().clone(), damping.input_shrinkage
    ridge = damping.inputs * diagonal.mean()
    target = (1 - share) * cross + matrices_of(fitted)[0] * (share * diagonal + ridge)
    matrix = psd_root(add_ridge_(to_diagonal_(moment, share), ridge)).solve(target.mT).mT
    return weight_from_matrices(fitted, matrix[None]), mean - matrix @ inputs.mean if centred else None


@torch.no_grad()
def _outputs(layer: nn.Module, rows: Tensor) -> Tensor:
    """The outputs of a dense layer for rows of its inputs."""
    bias = bias_of(layer)
    outputs = nn.functional.linear(rows, matrices_of(layer)[0].to(rows), None if bias is None else bias.to(rows))
    return outputs if outputs.dtype == torch.float64 else outputs.float()
