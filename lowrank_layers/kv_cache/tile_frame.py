"""Keys in the frame of their tile: rotated by the position of the tile's centre only, so that no key is rotated later.

Within a tile of few tokens the rotation that is left over is small, so keys still lie in few directions. A query is
rotated once per tile in place of every key, and its scores are products with coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .rope import TILE_FRAME, Rotation


@dataclass(frozen=True, eq=False)
class TileFrame:
    r"""Turns keys without their rotation into the frame of their tile, and back.

    A token at offset :math:`d` from the centre :math:`p` of its tile has the key :math:`R(p + d) k`, and
    :math:`q^T R(p + d) k = (R(-p) q)^T (R(d) k)`: what is stored is :math:`R(d) k`.

    Args:
        rotation: the rotary position embedding of the keys.
        size: number of entries of a head; heads lie side by side in a row.
    """

    rotation: Rotation
    size: int

    def into(self, rows: Tensor, start: int) -> Tensor:
        """Keys in the frame of their tile.

        Args:
            rows: keys without their rotation, ``[batch, groups, tokens, heads * size]``.
            start: index of the first token, counted from the start of a tile.
        """
        return self._turn(rows, start, 1)

    def out_of(self, rows: Tensor, start: int) -> Tensor:
        """The inverse of :meth:`into`.

        Args:
            rows: keys in the frame of their tile, ``[batch, groups, tokens, heads * size]``.
            start: index of the first token.
        """
        return self._turn(rows, start, -1)

    def of_offsets(self, mean: Tensor) -> Tensor:
        """A key's mean in the frame of a tile, for every offset.

        Args:
            mean: ``[..., size]``.

        Returns:
            ``[..., size, tokens of a tile]``.
        """
        offsets = torch.arange(TILE_FRAME, device=mean.device) - (TILE_FRAME - 1) / 2
        spread = mean[..., None, :].expand(*mean.shape[:-1], TILE_FRAME, -1)
        return self.rotation.turn(spread, offsets).mT

    @cached_property
    def entries(self) -> Tensor:
        """:meth:`Rotation.entries` of a head."""
        return self.rotation.entries(self.size)

    def average(self, second: Tensor) -> Tensor:
        r"""The mean of :math:`R(d) M R(d)^T` over the offsets of a tile.

        Args:
            second: a second moment of keys without their rotation, ``[..., heads * size, heads * size]``.
        """
        spread = second.new_zeros(second.shape)
        for offset in range(TILE_FRAME):
            # R M R^T: the rows of M R^T and then those of its transpose are turned
            half = self._turn_one(second, offset)
            spread = spread + self._turn_one(half.mT, offset).mT
        return spread / TILE_FRAME

    def centres(self, tiles: int, device: torch.device) -> Tensor:
        """Indices of the centres of the first tiles.

        Args:
            tiles: how many.
            device: where they are needed.
        """
        return torch.arange(tiles, device=device) * TILE_FRAME + (TILE_FRAME - 1) / 2

    def _turn(self, rows: Tensor, start: int, sign: int) -> Tensor:
        offsets = torch.arange(start, start + rows.shape[2], device=rows.device) % TILE_FRAME - (TILE_FRAME - 1) / 2
        heads = rows.unflatten(-1, (-1, self.size)).transpose(2, 3)
        turned: Tensor = self.rotation.turn(heads, sign * offsets).transpose(2, 3).flatten(3)
        return turned

    def _turn_one(self, rows: Tensor, offset: int) -> Tensor:
        at = torch.tensor([offset - (TILE_FRAME - 1) / 2], device=rows.device)
        turned: Tensor = self.rotation.turn(rows.unflatten(-1, (-1, 1, self.size)), at).flatten(-3)
        return turned
