"""The held-out score that a recovery keeps the best state by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import Padding, call_loss, quiet_eval
from ...errors import LowRankError
from .objective import Metric, Objective, autocast, run_batch

Score = Callable[[nn.Module], Any]
"""``score(model) -> number``, such as the rate of successful episodes; greater is better."""


@dataclass(frozen=True)
class Scoring:
    """How a model is scored: on held-out batches or by a function of it; not at all, and then false, without both.

    Args:
        validation: held-out batches.
        metric: a mean over a batch of them; ``None`` is minus the objective.
        score: in the place of both, a function of the model.

    Raises:
        LowRankError: for two ways at once, or what is no function.
    """

    validation: Iterable[Any] | None
    metric: Metric | None
    score: Score | None

    def __post_init__(self) -> None:
        for name, function in (("metric", self.metric), ("score", self.score)):
            if function is not None and not callable(function):
                raise LowRankError(f"recover_: got {name} of type {type(function).__name__}, expected a function.")
        if self.score is not None and (self.metric is not None or self.validation is not None):
            raise LowRankError(
                "recover_: got score= beside validation= or metric=, expected one way to score the model."
            )
        if self.metric is not None and self.validation is None:
            raise LowRankError("recover_: got metric= without validation=, expected held-out batches to measure it on.")

    def __bool__(self) -> bool:
        return self.validation is not None or self.score is not None

    def sums(
        self, model: nn.Module, objective: Objective, padding: Padding, dtype: torch.dtype | None
    ) -> tuple[float, float] | None:
        """Returns the sum of the scores and their number, or ``None`` where nothing is scored.

        Args:
            model: what is scored, not wrapped.
            objective: what is minimized.
            padding: what follows the masks of the model's forward passes, entered.
            dtype: dtype of autocast, or ``None``.
        """
        if self.score is not None:
            with quiet_eval(model), torch.no_grad():
                return float(self.score(model)), 1.0
        if self.validation is None:
            return None
        sign, measure = (-1, objective) if self.metric is None else (1, self.metric)
        total, count = held_out_sums(model, self.validation, {"score": measure}, padding, dtype)
        return sign * total["score"], float(count)


def mean_score(total: float, count: float) -> float:
    """Returns the mean of scores; raises if there are none."""
    if not count:
        raise LowRankError("recover_: validation has no batches, expected at least one in every pass over it.")
    return total / count


def held_out_sums(
    model: nn.Module, batches: Iterable[Any], metrics: Mapping[str, Metric], padding: Padding, dtype: torch.dtype | None
) -> tuple[dict[str, float], int]:
    """Returns the sums of metrics over samples, and the number of samples.

    Args:
        model: what is run, in eval mode and without gradients.
        batches: the held-out batches.
        metrics: means over a batch, by name.
        padding: what follows the masks of the model's forward passes, entered.
        dtype: dtype of autocast, or ``None``.
    """
    sums, count = dict.fromkeys(metrics, 0.0), 0
    with quiet_eval(model), torch.no_grad(), autocast(model, dtype):
        for batch in batches:
            samples = samples_of(batch)
            count += samples

            def measure(output: Any, target: Any, mask: Tensor | None = None, samples: int = samples) -> None:
                for name, metric in metrics.items():
                    sums[name] += samples * float(call_loss(metric, output, target, mask))

            run_batch(model, batch, padding, measure)
    return sums, count


def samples_of(batch: Any) -> int:
    """Returns the number of samples in a batch: the length of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    first = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    return 1 if first is None else len(first)
