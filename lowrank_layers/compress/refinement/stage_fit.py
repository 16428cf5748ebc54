"""Training one stage of a model on what comes to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import LowRankError
from .output_error import OutputError
from .settings import RefinementSettings
from .stage_passes import StagePass


@dataclass
class Example:
    """One batch before a stage.

    Args:
        given: the pass that stands before it.
        dense: that of the dense model.
        kept: what the stage of the dense model gives, and which rows of that are data; ``None`` where that is so wide
            that it is computed each time.
    """

    given: StagePass
    dense: StagePass
    kept: tuple[Tensor, Tensor | None] | None

    @classmethod
    def of(cls, given: StagePass, dense: StagePass, *, wide: bool) -> Example:
        """Returns that of two passes, and runs the stage of the dense model unless its output is wide.

        Args:
            given: the pass that stands before it.
            dense: that of the dense model.
            wide: whether its output is.
        """
        if wide:
            return cls(given, dense, None)
        expected, data = dense.give().main_rows()
        return cls(given, dense, (expected.clone(), data))  # the model may change it in place

    @torch.no_grad()
    def expected(self) -> tuple[Tensor, Tensor | None]:
        """Returns what the stage of the dense model gives, and which rows of that are data; ``None`` for all."""
        return self.dense.compute() if self.kept is None else self.kept


def fit_stage_(
    name: str,
    trained: Mapping[str, nn.Parameter],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    error: OutputError,
    settings: RefinementSettings,
) -> list[float]:
    """Trains the parameters of a stage, and leaves them in the state of the least error on held-out batches.

    Args:
        name: the stage, for messages.
        trained: its parameters that are trained.
        examples: batches to train on.
        held_out: batches to choose the state by.
        error: the error that is minimized.
        settings: how it is trained.

    Returns:
        The errors on held-out batches: of the state before, and after each epoch.

    Raises:
        LowRankError: for an error that is not finite.
    """
    parameters = list(trained.values())
    steps = settings.as_recovery(settings.epochs * len(examples))
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    errors = [_mean_error(name, held_out, error)]
    best = [parameter.detach().clone() for parameter in parameters]
    for epoch in range(settings.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(epoch))
        for place, k in enumerate(order.tolist()):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * steps.lr_factor(epoch * len(examples) + place)
            with torch.enable_grad():
                value = _error(examples[k], error)
            if not math.isfinite(found := float(value.detach())):
                raise LowRankError(f"refine_: the error of {name!r} is {found}; lower lr={settings.lr!r}.")
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
        errors.append(_mean_error(name, held_out, error))
        if errors[-1] < min(errors[:-1]):
            best = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    return errors


def _error(example: Example, error: OutputError) -> Tensor:
    output, _ = example.given.compute()
    return error(output, *example.expected())


def _mean_error(name: str, examples: Sequence[Example], error: OutputError) -> float:
    with torch.no_grad():
        mean = sum(float(_error(example, error)) for example in examples) / len(examples)
    if not math.isfinite(mean):
        raise LowRankError(f"refine_: the error of {name!r} on held-out batches is {mean}; look at the batches.")
    return mean
