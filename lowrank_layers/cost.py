"""The cost of layers: parameters, multiply-accumulates, bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, repr=False)
class Cost:
    """Parameters, multiply-accumulates per sample, bytes of weights and seconds. Costs can be added and subtracted.

    Args:
        params: number of parameters.
        macs: multiply-accumulate operations per sample (half of the FLOPs that counters report).
        bytes: size of the parameters in memory, and of the buffers that are saved with them, in bytes.
        latency: measured seconds of a forward pass; 0 where nothing was measured.

    Examples:
        >>> lr.Cost(params=10, macs=20, bytes=40) + lr.Cost(params=1, macs=2, bytes=4)
        Cost(params=11, macs=22, bytes=44)
    """

    params: int = 0
    macs: int = 0
    bytes: int = 0
    latency: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.bytes + other.bytes,
            self.latency + other.latency,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.params - other.params,
            self.macs - other.macs,
            self.bytes - other.bytes,
            self.latency - other.latency,
        )

    def __repr__(self) -> str:
        latency = f", latency={self.latency!r}" if self.latency else ""
        return f"Cost(params={self.params}, macs={self.macs}, bytes={self.bytes}{latency})"
