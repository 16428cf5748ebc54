"""Consecutive tokens of a cache as attention reads them: exact ones, and old ones that are never rebuilt whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .compressed_tokens import CompressedTokens
from .rope import TILE, Rotation
from .row_starts import RowStarts

MOST_TURNED = 32
"""Most rows that are turned back to every tile; for more it is cheaper to rotate the keys."""


class Segment(Protocol):
    """Consecutive tokens of a cache: what :func:`~lowrank_layers.kv_cache.attend.attend` needs of them."""

    @property
    def heads(self) -> int:
        """Number of heads of keys and values."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""

    def scores(self, rows: Tensor) -> Tensor:
        """Products of rows and keys: ``[batch, heads, rows, size]`` to ``[batch, heads, rows, tokens]``."""

    def mixed(self, weights: Tensor) -> Tensor:
        """Weighted sums of values: ``[batch, heads, rows, tokens]`` to ``[batch, heads, rows, size]``."""

    def dense_keys(self, dtype: torch.dtype) -> Tensor:
        """The keys in a dtype, ``[batch, heads, tokens, size]``."""

    def dense_values(self, dtype: torch.dtype) -> Tensor:
        """The values in a dtype, ``[batch, heads, tokens, size]``."""


@dataclass(frozen=True, eq=False)
class ExactSegment:
    """Tokens as they came.

    Args:
        keys: ``[batch, heads, tokens, size]``.
        values: ``[batch, heads, tokens, size]``.
    """

    keys: Tensor
    values: Tensor

    @property
    def heads(self) -> int:
        """Number of heads of keys and values."""
        return self.keys.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.shape[2]

    def scores(self, rows: Tensor) -> Tensor:
        """As :meth:`Segment.scores`."""
        return rows @ self.keys.to(rows.dtype).mT

    def mixed(self, weights: Tensor) -> Tensor:
        """As :meth:`Segment.mixed`."""
        return weights @ self.values.to(weights.dtype)

    def dense_keys(self, dtype: torch.dtype) -> Tensor:
        """As :meth:`Segment.dense_keys`."""
        return self.keys.to(dtype)

    def dense_values(self, dtype: torch.dtype) -> Tensor:
        """As :meth:`Segment.dense_values`."""
        return self.values.to(dtype)


class CompressedKeys(Protocol):
    """What attention reads of compressed keys."""

    @property
    def heads(self) -> int:
        """Number of heads."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""

    def scores(self, rows: Tensor) -> Tensor:
        """Products of rows and keys, ``[batch, heads, rows, tokens]``."""

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A range of keys, ``[batch, heads, stop - start, size]``."""


class CompressedValues(Protocol):
    """What attention reads of compressed values."""

    def mixed(self, weights: Tensor) -> Tensor:
        """Weighted sums of values, ``[batch, heads, rows, size]``."""

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A range of values, ``[batch, heads, stop - start, size]``."""


@dataclass(frozen=True, eq=False)
class CompressedSegment:
    """Tokens as coefficients.

    Args:
        keys: compressed keys, without their rotation if there is one.
        values: compressed values.
        rotation: the rotation that is put on the keys again; ``None`` where they have none.
        offset: index of the first token.
        starts: where rows begin that are padded on the left; ``None`` where there is none.
    """

    keys: CompressedKeys
    values: CompressedValues
    rotation: Rotation | None
    offset: int
    starts: RowStarts | None = None

    @property
    def heads(self) -> int:
        """Number of heads of keys and values."""
        return self.keys.heads

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.tokens

    def scores(self, rows: Tensor) -> Tensor:
        """As :meth:`Segment.scores`, in the subspace, or tile by tile where keys are rotated."""
        if self.rotation is None:
            return self.keys.scores(rows)
        if torch.compiler.is_compiling():
            return rows @ self.dense_keys(rows.dtype).mT
        if self.starts is not None:
            # keys of a row that begins at s are at positions i - s, and q^T R(i - s) k = (R(s) q)^T R(i) k
            rows = self.rotation.turn(rows, self.starts.index[:, None, None])
        if rows.shape[2] <= MOST_TURNED and isinstance(self.keys, CompressedTokens) and self.keys.frame is not None:
            return self.keys.tile_scores(rows, self.rotation.tile_waves(self.offset, self.tokens))
        found = []
        for start in range(0, self.tokens, TILE):
            stop = min(start + TILE, self.tokens)
            keys = self.rotation.turn_tile(self.keys.rebuilt(start, stop, rows.dtype))
            # rotating the rows back by the tile's first index lets the cosines of one tile serve every tile
            back = torch.tensor([-(self.offset + start)], device=rows.device)
            found.append(self.rotation.turn(rows, back) @ keys.mT)
        return torch.cat(found, -1)

    def mixed(self, weights: Tensor) -> Tensor:
        """As :meth:`Segment.mixed`, in the subspace."""
        return self.values.mixed(weights)

    def dense_keys(self, dtype: torch.dtype) -> Tensor:
        """As :meth:`Segment.dense_keys`, rotated again."""
        keys = self.keys.rebuilt(0, self.tokens, dtype)
        if self.rotation is None:
            return keys
        index = torch.arange(self.offset, self.offset + self.tokens, device=keys.device)
        return self.rotation.turn(keys, index if self.starts is None else self.starts.positions(index))

    def dense_values(self, dtype: torch.dtype) -> Tensor:
        """As :meth:`Segment.dense_values`."""
        return self.values.rebuilt(0, self.tokens, dtype)
