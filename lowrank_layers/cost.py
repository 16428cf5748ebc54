"""The cost of layers: parameters, multiply-accumulates and bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Number of parameters, multiply-accumulates per sample and bytes of weights. Costs can be added and subtracted.

    Args:
        params: number of parameters.
        macs: multiply-accumulate operations per sample (half of the FLOPs that counters report).
        bytes: size of the parameters in memory, in bytes.

    Examples:
        >>> lr.Cost(params=10, macs=20, bytes=40) + lr.Cost(params=1, macs=2, bytes=4)
        Cost(params=11, macs=22, bytes=44)
    """

    params: int = 0
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.bytes - other.bytes)
