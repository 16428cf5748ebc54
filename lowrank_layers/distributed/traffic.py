"""What went over the wire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Clock:
    """Adds up the seconds of a block of code; what is launched on a GPU goes on after it."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is inside."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@dataclass
class Traffic:
    """Sums over all buckets of this process.

    Args:
        sent: bytes that an all-reduce was given; of two exchanges in its place, as much as would take as long.
        whole: bytes that whole gradients would have been.
        seconds: in the worker.
    """

    sent: int = 0
    whole: int = 0
    seconds: float = 0.0

    def count(self, sent: int, whole: int, seconds: float) -> None:
        """One more bucket."""
        self.sent += sent
        self.whole += whole
        self.seconds += seconds

    def summary(self, exchanging: float) -> dict[str, float]:
        """With the ratio of the two, and the seconds that were not ``exchanging``."""
        return {
            "bytes_sent": self.sent,
            "bytes_whole": self.whole,
            "ratio": self.whole / max(1, self.sent),
            "seconds": self.seconds,
            "seconds_computing": self.seconds - exchanging,
            "seconds_exchanging": exchanging,
        }
