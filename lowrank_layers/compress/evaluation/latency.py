"""How long a call takes, of one model or of two by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARM_UP = 3
"""Calls before the first that is measured."""


@dataclass(frozen=True)
class Latency:
    """Seconds per call.

    Args:
        median: the median.
        spread: the distance between the quartiles.
    """

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Returns median and spread of measured times.

        Args:
            seconds: two or more.

        Examples:
            >>> from lowrank_layers.compress.evaluation import Latency
            >>> Latency.of([1.0, 2.0, 3.0, 4.0, 5.0])
            Latency(median=3.0, spread=2.0)
        """
        first, middle, last = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, last - first)


def paired_seconds(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Returns the seconds of every call of each function; they are called by turns, so that all meet the same machine.

    Args:
        calls: what is timed.
        repeats: number of measured calls of each.
        device: the device whose queue is waited for.
        clock: a function that returns seconds.
    """
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(_WARM_UP + repeats):
        order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
        for k in order:
            _wait(device)
            start = clock()
            calls[k]()
            _wait(device)
            found[k].append(clock() - start)
    return [seconds[_WARM_UP:] for seconds in found]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
