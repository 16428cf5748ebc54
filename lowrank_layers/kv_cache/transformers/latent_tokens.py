"""Latents as an ordinary cache holds them, in the form in which attention reads old tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compressed_tokens import CompressedTokens
from ..rope import TILE


@dataclass(frozen=True, eq=False)
class NormedKeys:
    """Keys with a norm over each head between the up-projection and the rotation.

    A norm is not linear: no query can be brought into the subspace, and keys are always rebuilt tile by tile.

    Args:
        keys: the keys before the norm.
        norm: the norm over the last dimension.
    """

    keys: CompressedTokens
    norm: Callable[[Tensor], Tensor]

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.keys.heads

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.tokens

    def scores(self, rows: Tensor) -> Tensor:
        """The product of every row with every key, ``[batch, heads, q, tokens]``.

        Args:
            rows: ``[batch, heads, q, size]``.
        """
        ends = [(start, min(start + TILE, self.tokens)) for start in range(0, self.tokens, TILE)]
        return torch.cat([rows @ self.rebuilt(*each, rows.dtype).mT for each in ends], -1)

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A range of keys, ``[batch, heads, stop - start, size]``.

        Args:
            start: index of the first token.
            stop: index after the last one.
            dtype: dtype of the result.
        """
        return self.norm(self.keys.rebuilt(start, stop, dtype)).to(dtype)


@dataclass(frozen=True, eq=False)
class UnliftedValues:
    """Values whose up-projection is left to the output projection: weighted sums are sums of latents.

    Args:
        latents: ``[batch, groups, rank, tokens]``.
    """

    latents: Tensor

    def mixed(self, weights: Tensor) -> Tensor:
        """Weighted sums of latents, ``[batch, heads, q, rank]``.

        Args:
            weights: ``[batch, heads, q, tokens]``.
        """
        split = weights.unflatten(1, (self.latents.shape[1], -1))
        summed: Tensor = split.flatten(2, 3) @ self.latents.mT.to(weights.dtype)
        found: Tensor = summed.unflatten(2, split.shape[2:4]).flatten(1, 2)
        return found

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A range of latents, ``[batch, groups, stop - start, rank]``.

        Args:
            start: index of the first token.
            stop: index after the last one.
            dtype: dtype of the result.
        """
        return self.latents[..., start:stop].mT.to(dtype)
