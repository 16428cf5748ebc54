"""Keys or values that leave the exact tokens to be compressed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rope import Rotation


@dataclass(frozen=True, eq=False)
class LeavingTokens:
    """Keys or values of consecutive tokens, as they came.

    Args:
        exact: ``[batch, heads, tokens, size]``.
        rotation: the rotation that they carry; ``None`` where they have none.
        start: index of the first token in the cache.
        positions: positions of the tokens, ``[batch, 1, tokens]``; ``None`` are their indices.
    """

    exact: Tensor
    rotation: Rotation | None = None
    start: int = 0
    positions: Tensor | None = None

    @property
    def plain(self) -> Tensor:
        """Without their rotation, in fp32."""
        wide = self.exact.float()
        if self.rotation is None:
            return wide
        stop = self.start + self.exact.shape[2]
        positions = torch.arange(self.start, stop, device=wide.device) if self.positions is None else self.positions
        return self.rotation.turn(wide, -positions)

    def of_heads(self, heads: slice | list[int]) -> LeavingTokens:
        """Those of some heads.

        Args:
            heads: indices of the heads.
        """
        return self if heads == slice(None) else replace(self, exact=self.exact[:, heads])
