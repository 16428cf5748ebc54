"""Whether the link is slow enough for compression to win: measured, not assumed."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

STEPS = 8
"""Of each way; the first two are not counted."""

GAIN = 0.9
"""Compression has to take less than this of a whole gradient's step: it costs accuracy too."""


class Link:
    """Times some steps with whole gradients, then some with compressed ones, and chooses the faster way."""

    def __init__(self) -> None:
        self.taken: dict[bool, list[float]] = {True: [], False: []}
        self.compress: bool | None = None  # not known yet
        self._last: float | None = None

    @property
    def trying(self) -> bool:
        """The way of the next step."""
        return self.compress if self.compress is not None else len(self.taken[False]) >= STEPS

    def stepped(self, compressed: bool) -> None:
        """One step, computation and optimizer included, has ended."""
        now = time.perf_counter()
        if self._last is not None and self.compress is None:
            self.taken[compressed].append(now - self._last)
        self._last = now

    def ready(self) -> bool:
        """Whether both ways were tried often enough."""
        return self.compress is None and all(len(taken) >= STEPS for taken in self.taken.values())

    def times(self) -> Tensor:
        """Seconds a step with whole and with compressed gradients."""
        return torch.tensor([statistics.median(self.taken[way][2:]) for way in (False, True)])

    def decide(self, times: Tensor) -> None:
        """By the times of the slowest process."""
        self.compress = bool(times[1] < GAIN * times[0])
