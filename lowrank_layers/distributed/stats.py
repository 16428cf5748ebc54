"""Bytes sent and seconds taken, for ``stats()``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stopwatch:
    """Adds up the seconds that blocks of code take; kernels launched on a GPU may run on after their block."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures the block."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@dataclass
class CommStats:
    """Sums over all buckets of this process.

    Args:
        sent: bytes passed to all-reduce. Where two other collectives replace an all-reduce, the bytes of an all-reduce
            that would take as long.
        whole: bytes of the same gradients uncompressed.
        seconds: seconds spent in averaging.
    """

    sent: int = 0
    whole: int = 0
    seconds: float = 0.0

    def add(self, sent: int, whole: int, seconds: float) -> None:
        """Counts one more bucket."""
        self.sent += sent
        self.whole += whole
        self.seconds += seconds

    def summary(self, exchanging: float) -> dict[str, float]:
        """The sums, their ratio, and the seconds split into computing and ``exchanging``."""
        return {
            "bytes_sent": self.sent,
            "bytes_whole": self.whole,
            "ratio": self.whole / max(1, self.sent),
            "seconds": self.seconds,
            "seconds_computing": self.seconds - exchanging,
            "seconds_exchanging": exchanging,
        }
