"""Rotary position embedding: taken off before keys are compressed, put on again where they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import LowRankError

TILE = 256
"""Tokens that are turned at a time."""


@dataclass(frozen=True, eq=False)
class Rotation:
    r"""RoPE by a token's index in the cache (Su et al., 2021): pair ``j`` turns by :math:`i \theta_j`.

    Keys lie in few directions before they are turned, and in many after. Since only differences of positions count, the
    index in the cache serves for a row with padding on the left too: its keys keep one constant rotation.

    Args:
        frequencies: :math:`\theta`, ``[pairs]``.
        interleaved: whether a pair is ``(2j, 2j + 1)``; otherwise it is ``(j, j + pairs)``.
        start: the first entry of a head that is turned; those outside ``start ... start + 2 pairs`` stay.

    Examples:
        >>> rotation = lr.Rotation.of(64)
        >>> keys = torch.randn(2, 10, 64)
        >>> turned = rotation.turn(keys, torch.arange(10))
        >>> torch.allclose(rotation.turn(turned, -torch.arange(10)), keys, atol=1e-5)
        True
    """

    frequencies: Tensor
    interleaved: bool = False
    start: int = 0

    @classmethod
    def of(cls, size: int, *, base: float = 10000.0, interleaved: bool = False, start: int = 0) -> Rotation:
        """The usual frequencies ``base^(-2j / size)`` for ``size`` turned entries."""
        if size < 2 or size % 2:
            raise LowRankError(f"Rotation: got size {size!r}, expected an even number of turned entries.")
        return cls(base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size), interleaved, start)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """``[..., tokens, head]`` turned, each token by its position; negative ones turn back."""
        cos, sin = self.table(positions)
        return self.apply(x, cos.to(x.dtype), sin.to(x.dtype))

    def turn_tile(self, x: Tensor) -> Tensor:
        """At most ``TILE`` tokens, turned by 0, 1, 2..."""
        cos, sin = (t[: x.shape[-2]].to(x.dtype) for t in self._tile)
        return self.apply(x, cos, sin)

    def to(self, device: torch.device) -> Rotation:
        """With its tables on that device."""
        if self.frequencies.device == device:
            return self
        return Rotation(self.frequencies.to(device), self.interleaved, self.start)

    def nbytes(self) -> int:
        """Of the table, which all layers share."""
        return sum(t.nbytes for t in self._tile)

    @cached_property
    def _tile(self) -> tuple[Tensor, Tensor]:
        return self.table(torch.arange(TILE, device=self.frequencies.device))

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``[tokens, pairs]``."""
        angles = positions[:, None].float() * self.frequencies.to(positions.device)
        return angles.cos(), angles.sin()

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns by given cosines and sines."""
        size = 2 * cos.shape[-1]
        part = x[..., self.start : self.start + size]
        left, right = (part[..., 0::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        turned = torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin)
        both = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        if size == x.shape[-1]:
            return both
        return torch.cat([x[..., : self.start], both, x[..., self.start + size :]], -1)
