"""What a recovery minimizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...calibrate import Loss, Padding, call_loss, describe_output, forward, main_output, target_of
from ...errors import LowRankError
from .distillation import Distillation

Metric = Callable[[Any, Any], Any]
"""``metric(output, target) -> number``, a mean over the batch; greater is better."""


class Objective:
    """The objective of one batch, a function of output, target and mask.

    Args:
        loss: the user's loss; ``None`` is the cross-entropy where nothing is distilled.
        distillation: the distance from a teacher, if there is one.
        class_dim: the dimension of the classes, for the cross-entropy.
    """

    def __init__(self, loss: Loss | None, distillation: Distillation | None, class_dim: int) -> None:
        self._loss = loss if loss is not None or distillation is not None else self._cross_entropy
        self._distillation = distillation
        self._class_dim = class_dim

    def __call__(self, output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
        """Returns the weighted sum of the loss and the distance from the teacher."""
        terms = [] if self._distillation is None else [self._distillation(output, target, mask)]
        if self._loss is not None:
            terms.append(call_loss(self._loss, output, target, mask))
        return terms[0] + terms[1] if len(terms) == 2 else terms[0]

    def _cross_entropy(self, output: Any, target: Any) -> Tensor:
        own = getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        logits = main_output(output)
        if logits is None or not isinstance(target, Tensor):
            raise LowRankError(
                f"recover_: the model returned {describe_output(output)} for a target of type {type(target).__name__},"
                " expected logits and labels, as in a batch (inputs, labels); give loss= or teacher= otherwise."
            )
        logits = logits.movedim(self._class_dim, -1)
        if target.shape == logits.shape:  # class probabilities
            return F.cross_entropy(logits.flatten(0, -2), target.flatten(0, -2))
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def run_batch(model: nn.Module, batch: Any, padding: Padding, function: Metric) -> Any:
    """Runs a model on a batch, and gives its output, target and, where it takes one, mask to a loss or metric."""
    padding.start(batch, target_of(batch))
    output, target = forward(model, batch, with_target=True)
    return call_loss(function, output, target, padding.of_output(main_output(output)))


def autocast(model: nn.Module, dtype: torch.dtype | None) -> Any:
    """Autocast on the model's device, or nothing where no dtype is given."""
    return nullcontext() if dtype is None else torch.autocast(device_of(model).type, dtype)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's first parameter or buffer."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
