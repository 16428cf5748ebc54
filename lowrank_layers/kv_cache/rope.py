"""Rotary position embedding (RoPE): taken off before keys are compressed, put on again where they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import LowRankError

TILE = 256
"""Tokens that are rotated at a time."""
TILE_FRAME = 32
"""Tokens per tile whose keys are stored in its frame: see ``tile_frame.py``."""


@dataclass(frozen=True, eq=False)
class Rotation:
    r"""Rotary position embedding: pair ``j`` of a key's entries is rotated by :math:`i \theta_j`.

    Here :math:`i` is the index of the token in the cache, counted from the first token of its row that is no padding.
    Keys lie in few directions before they are rotated, and in many after.

    Args:
        frequencies: the angle per position of each pair, :math:`\theta`, ``[pairs]``.
        interleaved: whether a pair is ``(2j, 2j + 1)``; otherwise it is ``(j, j + pairs)``.
        start: the first entry of a head that is rotated; those outside ``start ... start + 2 pairs`` stay.

    Examples:
        >>> rotation = lr.Rotation.of(64)
        >>> keys = torch.randn(2, 10, 64)
        >>> turned = rotation.turn(keys, torch.arange(10))
        >>> torch.allclose(rotation.turn(turned, -torch.arange(10)), keys, atol=1e-5)
        True

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """

    frequencies: Tensor
    interleaved: bool = False
    start: int = 0

    @classmethod
    def of(cls, size: int, *, base: float = 10000.0, interleaved: bool = False, start: int = 0) -> Rotation:
        """The rotation with the usual frequencies ``base^(-2j / size)``.

        Args:
            size: number of entries that are rotated.
            base: base of the frequencies, called ``rope_theta`` by transformers.
            interleaved: whether a pair is ``(2j, 2j + 1)``; otherwise it is ``(j, j + size / 2)``.
            start: the first entry of a head that is rotated.

        Raises:
            LowRankError: for a size that is not even.
        """
        if size < 2 or size % 2:
            raise LowRankError(f"Rotation: got size {size!r}, expected an even number of rotated entries.")
        return cls(base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size), interleaved, start)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates each token by its position.

        Args:
            x: queries or keys, ``[..., tokens, size]``.
            positions: ``[tokens]``, or more dimensions that broadcast with ``x``; negative ones rotate back.
        """
        cos, sin = self._cos_sin(positions)
        return self._apply(x, cos.to(x.dtype), sin.to(x.dtype))

    def turn_tile(self, x: Tensor) -> Tensor:
        """Rotates tokens by 0, 1, 2..., with cosines that are kept.

        Args:
            x: ``[..., tokens, size]``, of at most ``TILE`` tokens.
        """
        cos, sin = (t[: x.shape[-2]].to(x.dtype) for t in self._tile)
        return self._apply(x, cos, sin)

    def turned_back(self, query: Tensor, basis: Tensor) -> Tensor:
        r"""What turns a query back by any position and multiplies it by a basis, in one product.

        With :math:`c_j, s_j` the cosine and sine of pair :math:`j` at position :math:`p`, the rows
        :math:`(R(-p) q)^T B` are the product of :meth:`waves` with the result.

        Args:
            query: ``[..., size]``.
            basis: ``[..., size, rank]``.

        Returns:
            ``[..., 2 pairs + 1, rank]``.
        """
        left, right, rest = self._parts(query[..., None], -2)
        first, second, others = self._parts(basis, -2)
        cosines = torch.addcmul(left * first, right, second)
        sines = torch.addcmul(right * first, left, second, value=-1)
        return torch.cat([cosines, sines, (rest * others).sum(-2, keepdim=True)], -2)

    def waves(self, positions: Tensor) -> Tensor:
        """Cosines, sines and a one for each position, ``[positions, 2 pairs + 1]``.

        Args:
            positions: ``[positions]``.
        """
        return torch.cat([*self._cos_sin(positions), torch.ones(len(positions), 1, device=positions.device)], -1)

    def tile_waves(self, offset: int, tokens: int) -> Tensor:
        """:meth:`waves` of the centres of tiles, which are kept: all layers of a model ask for the same.

        Args:
            offset: index of the first token of the first tile.
            tokens: number of tokens of all tiles.
        """
        tiles = -(-tokens // TILE_FRAME)
        held = self._kept.get(offset)
        if held is None or len(held) < tiles:
            centres = torch.arange(tiles + tiles // 8, device=self.frequencies.device) * TILE_FRAME
            held = self.waves(offset + centres + (TILE_FRAME - 1) / 2)
            self._kept.clear()
            self._kept[offset] = held
        return held[:tiles]

    @cached_property
    def offset_waves(self) -> Tensor:
        """:meth:`waves` of a tile's tokens about its centre, ``[2 pairs + 1, tokens]``."""
        offsets = torch.arange(TILE_FRAME, device=self.frequencies.device) - (TILE_FRAME - 1) / 2
        return self.waves(offsets).mT.contiguous()

    def entries(self, size: int) -> Tensor:
        """Indices of the entries of a head: the first and the second ones of all pairs, and those that stay.

        Args:
            size: number of entries of a head.
        """
        return torch.cat(self._parts(torch.arange(size), -1))

    def to(self, device: torch.device) -> Rotation:
        """The same rotation on another device.

        Args:
            device: where its frequencies go.
        """
        if self.frequencies.device == device:
            return self
        return Rotation(self.frequencies.to(device), self.interleaved, self.start)

    def equals(self, other: Rotation) -> bool:
        """Whether two rotations are one, on one device.

        Args:
            other: another rotation.
        """
        alike = (self.interleaved, self.start) == (other.interleaved, other.start)
        here = self.frequencies.device == other.frequencies.device
        return alike and here and torch.equal(self.frequencies, other.frequencies)

    def nbytes(self) -> int:
        """Bytes of the cosines and sines that are kept, which all layers share."""
        return sum(t.nbytes for t in (*self._tile, self.offset_waves, *self._kept.values()))

    @cached_property
    def _kept(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def _tile(self) -> tuple[Tensor, Tensor]:
        return self._cos_sin(torch.arange(TILE, device=self.frequencies.device))

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``[..., tokens, pairs]``."""
        angles = positions[..., None].float() * self.frequencies.to(positions.device)
        return angles.cos(), angles.sin()

    def _parts(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first and the second entries of all pairs, and the entries that are not rotated."""
        size = 2 * len(self.frequencies)
        before, part, after = x.split([self.start, size, x.shape[dim] - self.start - size], dim)
        pairs = part.unflatten(dim, (-1, 2) if self.interleaved else (2, -1))
        left, right = pairs.unbind(dim if self.interleaved else dim - 1)
        return left, right, torch.cat([before, after], dim)

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = 2 * cos.shape[-1]
        part = x[..., self.start : self.start + size]
        left, right = (part[..., 0::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        turned = torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin)
        both = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        if size == x.shape[-1]:
            return both
        return torch.cat([x[..., : self.start], both, x[..., self.start + size :]], -1)
