"""Latents as an ordinary cache holds them, in the form in which the core attends over old tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coefficients import Coefficients
from ..compressed_tokens import Latent
from ..rope import TILE


class Borrowed(Coefficients):
    """Coefficients that a cache of transformers owns: read, never stored again.

    Args:
        values: ``[batch, groups, rank, tokens]``, a view of what is cached.
    """

    def __init__(self, values: Tensor) -> None:
        self.dtype, self.values, self.scales = values.dtype, values, None


@dataclass(eq=False)
class Normed(Latent):
    """Keys with a norm over each head between the up-projection and the rotation.

    A norm is not linear: no query can be brought into the subspace, and keys are always rebuilt tile by tile.

    Args:
        norm: over the last dimension.
    """

    norm: Callable[[Tensor], Tensor]

    def scores(self, rows: Tensor) -> Tensor:
        """See :meth:`Part.scores`."""
        ends = [(at, min(at + TILE, self.tokens)) for at in range(0, self.tokens, TILE)]
        return torch.cat([rows @ self.rebuilt(*each, rows.dtype).mT for each in ends], -1)

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """``[batch, heads, stop - start, size]``."""
        return self.norm(super().rebuilt(start, stop, dtype)).to(dtype)


@dataclass(eq=False)
class Unlifted(Latent):
    """Values whose up-projection is left to the output projection: weighted sums are sums of coefficients.

    Args:
        coefficients: ``[batch, groups, rank, tokens]``.
    """

    coefficients: Tensor

    def mixed(self, weights: Tensor) -> Tensor:
        """``[batch, heads, q, rank]``."""
        split = weights.unflatten(1, (self.coefficients.shape[1], -1))
        summed: Tensor = split.flatten(2, 3) @ self.coefficients.mT.to(weights.dtype)
        found: Tensor = summed.unflatten(2, split.shape[2:4]).flatten(1, 2)
        return found

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The coefficients, ``[batch, groups, stop - start, rank]``."""
        return self.coefficients[..., start:stop].mT.to(dtype)
