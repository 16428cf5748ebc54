"""What a model costs and how good it is, counted and measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ...calibrate import Padding, check_batches, forward, quiet_eval
from ...checks import check_integer
from ...errors import LowRankError
from ...layers import codes
from ..recovery.distillation import unwrapped
from ..recovery.objective import Metric, device_of
from ..recovery.scoring import Score, held_out_sums, samples_of
from .counting import count_macs, peak_memory, stored_bytes
from .latency import Latency, paired_seconds


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Args:
        params: number of parameters, shared ones once.
        bytes: size of a safetensors file of the model without its header.
        macs: multiply-accumulates per sample.
        peak_memory: bytes of parameters, buffers and intermediate tensors in the forward pass of one batch.
        latency: seconds per forward pass of one batch.
        scores: metrics by name.
    """

    params: int
    bytes: int
    macs: int
    peak_memory: int
    latency: Latency
    scores: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns the numbers as JSON."""
        return json.dumps(asdict(self), indent=1)

    def numbers(self) -> dict[str, float]:
        """Returns the numbers by a name with their unit, as tables show them."""
        return {
            "parameters": self.params,
            "bytes": self.bytes,
            "MACs per sample": self.macs,
            "peak memory, bytes": self.peak_memory,
            "latency, ms": 1e3 * self.latency.median,
            "its spread, ms": 1e3 * self.latency.spread,
            **self.scores,
        }

    def __str__(self) -> str:
        rows = [(name, shown(value)) for name, value in self.numbers().items()]
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(f"{name:<{width[0]}}  {value:>{width[1]}}" for name, value in rows)


def shown(value: float) -> str:
    """Returns a number as text: counts in full, others to four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    metric: Metric | Mapping[str, Metric] | None = None,
    score: Score | Mapping[str, Score] | None = None,
    example: Any = None,
    repeats: int = 30,
) -> Evaluation:
    """Counts parameters, bytes, multiply-accumulates and memory of a model, times it, and takes its metrics.

    Args:
        model: the model, on the device where it is measured; it runs in eval mode and does not change.
        data: batches for the metrics: tensors, tuples ``(inputs..., target)`` or dicts of keyword arguments.
        metric: ``metric(output, target) -> number``, a mean over the batch, or several by name; their means over
            samples are the scores. One with an argument ``mask`` is given the mask of the output.
        score: ``score(model) -> number``, or several by name, such as the success over episodes.
        example: the batch whose forward pass is counted and timed; ``None`` takes the first batch of the data.
        repeats: number of forward passes that are timed.

    Raises:
        LowRankError: for no batches, batches of another kind, or metrics that are no functions.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> batches = [(torch.randn(20, 64), torch.randint(10, (20,)))]
        >>> accuracy = lambda output, target: (output.argmax(-1) == target).float().mean()
        >>> evaluation = lr.evaluate(model, batches, metric={"accuracy": accuracy})
        >>> evaluation.params, evaluation.bytes, evaluation.macs
        (2410, 9640, 2368)
        >>> 0 <= evaluation.scores["accuracy"] <= 1
        True
    """
    return evaluate_together([model], data, metric=metric, score=score, example=example, repeats=repeats)[0][0]


def evaluate_together(
    models: list[nn.Module],
    data: Iterable[Any],
    *,
    metric: Metric | Mapping[str, Metric] | None,
    score: Score | Mapping[str, Score] | None,
    example: Any,
    repeats: int,
) -> tuple[list[Evaluation], list[list[float]]]:
    """Returns the evaluation of each model, timed by turns, and the seconds of every call.

    Args:
        models: the models.
        data: as in :func:`evaluate`.
        metric: as in :func:`evaluate`.
        score: as in :func:`evaluate`.
        example: as in :func:`evaluate`.
        repeats: as in :func:`evaluate`.
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise LowRankError(f"evaluate: got model of type {type(model).__name__}, expected a torch.nn.Module.")
    check_batches(data, "evaluate")
    check_integer(repeats, "evaluate", "repeats", 2)
    metrics, scores = _by_name(metric, "metric"), _by_name(score, "score")
    if isinstance(data, Iterator):  # it is read more than once
        data = list(data)
    if example is None and (example := next(iter(data), None)) is None:
        raise LowRankError("evaluate: got no batches in data, expected at least one.")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(quiet_eval(model))
        calls = [partial(forward, model, example, with_target=True) for model in models]
        seconds = paired_seconds(calls, repeats, device_of(models[0]))
        found = []
        for model, call, timed in zip(models, calls, seconds, strict=True):
            values = _means(unwrapped(model), data, metrics)
            values |= {name: float(function(model)) for name, function in scores.items()}
            params = sum(p.numel() for p in model.parameters()) + codes(model)
            macs = count_macs(call) // samples_of(example)
            size, memory = stored_bytes(unwrapped(model)), peak_memory(model, call)
            found.append(Evaluation(params, size, macs, memory, Latency.of(timed), values))
    return found, seconds


def _means(model: nn.Module, data: Iterable[Any], metrics: Mapping[str, Metric]) -> dict[str, float]:
    if not metrics:
        return {}
    with Padding(model) as padding:
        sums, samples = held_out_sums(model, data, metrics, padding, None)
    return {name: value / samples for name, value in sums.items()}


def _by_name(given: Any, argument: str) -> dict[str, Callable[..., Any]]:
    """The functions by name; a single one goes by its own, or by that of the argument if it is a lambda."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        name = getattr(given, "__name__", type(given).__name__)
        given = {argument if name == "<lambda>" else name: given}
    for name, function in given.items():
        if not callable(function):
            raise LowRankError(
                f"evaluate: got {argument} {name!r} of type {type(function).__name__}, expected a function, or several"
                " in a dict by name."
            )
    return dict(given)
