"""The choice between compressed and uncompressed gradients, by measured time per step."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

STEPS = 8
"""Steps that are timed with each of the two; the first two of them are not counted."""

GAIN = 0.9
"""A compressed step has to take less than this fraction of an uncompressed one, since compression costs accuracy."""


class Fallback:
    """Times steps with uncompressed gradients, then steps with compressed ones, and chooses the faster.

    Args:
        dtype: dtype in which uncompressed gradients are sent; ``None`` is their own.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.compress: bool | None = None  # not chosen yet
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._last: float | None = None

    @property
    def compress_next(self) -> bool:
        """Whether the next step is compressed."""
        return self.compress if self.compress is not None else len(self._seconds[False]) >= STEPS

    def record(self, compressed: bool) -> None:
        """Measures the step that has just ended, computation and optimizer included."""
        now = time.perf_counter()
        if self._last is not None and self.compress is None:
            self._seconds[compressed].append(now - self._last)
        self._last = now

    def ready(self) -> bool:
        """Whether enough steps were timed to choose."""
        return self.compress is None and all(len(seconds) >= STEPS for seconds in self._seconds.values())

    def seconds_per_step(self) -> Tensor:
        """Median seconds per uncompressed and per compressed step."""
        return torch.tensor([statistics.median(self._seconds[compressed][2:]) for compressed in (False, True)])

    def choose(self, seconds: Tensor) -> None:
        """Chooses by the seconds per step of the slowest process."""
        self.compress = bool(seconds[1] < GAIN * seconds[0])
