"""Checks of what a calibration has taken."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..linalg import is_finite
from .fisher import SampledCrossEntropy, main_output
from .layer_stats import LayerStats
from .run import Loss, call_loss, check_loss, forward, with_main

_TINY = 1e-4
"""Gradients below it may be the rounding of zeros: a model's loss against itself has some of 1e-8."""


def check_seen(found: Sized) -> None:
    """Raises where there is no batch, or no layer was called.

    Args:
        found: the batches, or the statistics by layer.

    Raises:
        LowRankError: if it is empty.
    """
    if not found:
        raise LowRankError(
            "calibrate: no layer saw any data; batches is empty, or the model has no layer to calibrate (see target=)."
        )


def check_finite(name: str, stats: LayerStats) -> None:
    """Raises for moments with NaN or Inf.

    Args:
        name: name of the layer.
        stats: its statistics.

    Raises:
        LowRankError: if there are any.
    """
    for moment in (stats.inputs.second, stats.gradients):
        if moment is not None and not is_finite(moment):
            raise LowRankError(
                f"calibrate: layer {name!r} has NaN or Inf in its inputs or gradients; look at the batches."
            )


def largest_gradient(stats: LayerStats) -> float:
    """Returns the root of the largest entry of a layer's moment of gradients.

    Args:
        stats: the layer's statistics.
    """
    moment = stats.gradients
    return 0.0 if moment is None else max(abs(float(end)) for end in moment.aminmax()) ** 0.5


def check_gradients(model: nn.Module, batch: Any, loss: Loss, largest: float) -> None:
    """Raises for a loss whose gradients are zero, or the rounding of zeros.

    Args:
        model: the model, in eval mode.
        batch: one of its batches.
        loss: the loss.
        largest: the largest of :func:`largest_gradient` of all layers.

    Raises:
        LowRankError: if they are.
    """
    doubtful = largest < _TINY and not isinstance(loss, SampledCrossEntropy)
    if largest == 0 or (doubtful and _is_minimum(model, batch, loss)):
        raise LowRankError(
            "calibrate: the loss has no gradient at this model's output, so that no error of a layer would count (a"
            " model compared with itself is at a minimum); use SampledCrossEntropy(), the loss that the model was"
            " trained with, or loss=None."
        )


def _is_minimum(model: nn.Module, batch: Any, loss: Loss) -> bool:
    """Whether the loss has its minimum at the model's output: moved by one percent, its gradients are far larger."""
    with torch.no_grad():
        output, target = forward(model, batch, with_target=True)
    main = main_output(output)
    if main is None or with_main(output, main.clone()) is output:
        return False  # no telling which part to move

    def size(values: Tensor) -> float:
        values = values.detach().requires_grad_()
        with torch.enable_grad():
            value = check_loss(call_loss(loss, with_main(output, values), target, None), "calibrate", output)
            (gradient,) = torch.autograd.grad(value, values, allow_unused=True)
        return 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient.double()))

    signs = torch.ones_like(main).flatten()
    signs[::2] = -1
    return size(main) <= 1e-3 * size(main * (1 + 0.01 * signs.view_as(main)))
