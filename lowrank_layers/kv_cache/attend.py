"""Attention over pieces of a cache: exact tokens, and old ones that are never rebuilt as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LowRankError
from .autocast import as_autocast, without_autocast
from .compressed_tokens import Latent
from .masks import causal_mask
from .rope import TILE, Rotation

MOST_SCORES = 2**25
"""Most scores formed at once (128 MiB in fp32): longer runs of queries go in turns."""


class Piece(Protocol):
    """Consecutive tokens of a cache."""

    @property
    def heads(self) -> int:
        """Of keys and values."""

    @property
    def tokens(self) -> int:
        """How many."""

    def scores(self, rows: Tensor) -> Tensor:
        """Every row times every key, ``[batch, heads, rows, tokens]``."""

    def mixed(self, weights: Tensor) -> Tensor:
        """Values weighted and summed, ``[batch, heads, rows, size]``."""

    def dense_keys(self, dtype: torch.dtype) -> Tensor:
        """Keys, ``[batch, heads, tokens, size]``."""

    def dense_values(self, dtype: torch.dtype) -> Tensor:
        """Values, likewise."""


@dataclass(frozen=True, eq=False)
class Exact:
    """Tokens as they are."""

    keys: Tensor
    values: Tensor

    @property
    def heads(self) -> int:
        """Of keys and values."""
        return self.keys.shape[1]

    @property
    def tokens(self) -> int:
        """How many."""
        return self.keys.shape[2]

    def scores(self, rows: Tensor) -> Tensor:
        """Every row times every key."""
        return rows @ self.keys.to(rows.dtype).mT

    def mixed(self, weights: Tensor) -> Tensor:
        """Values weighted and summed."""
        return weights @ self.values.to(weights.dtype)

    def dense_keys(self, dtype: torch.dtype) -> Tensor:
        """Keys."""
        return self.keys.to(dtype)

    def dense_values(self, dtype: torch.dtype) -> Tensor:
        """Values."""
        return self.values.to(dtype)


@dataclass(frozen=True, eq=False)
class Old:
    """Tokens as coefficients.

    Args:
        keys: of which the rotation is taken off, if there is one.
        values: never rotated.
        rotation: to be put on the keys again.
        offset: index of the first token.
    """

    keys: Latent
    values: Latent
    rotation: Rotation | None
    offset: int

    @property
    def heads(self) -> int:
        """Of keys and values."""
        return self.keys.heads

    @property
    def tokens(self) -> int:
        """How many."""
        return self.keys.tokens

    def scores(self, rows: Tensor) -> Tensor:
        """Every row times every key: in the subspace, or, where keys are turned, tile by tile."""
        if self.rotation is None:
            return self.keys.scores(rows)
        if torch.compiler.is_compiling():
            return rows @ self.dense_keys(rows.dtype).mT
        found = []
        for start in range(0, self.tokens, TILE):
            stop = min(start + TILE, self.tokens)
            keys = self.rotation.turn_tile(self.keys.rebuilt(start, stop, rows.dtype))
            # turning the rows back by the tile's first index lets one table of cosines serve every tile
            back = torch.tensor([-(self.offset + start)], device=rows.device)
            found.append(self.rotation.turn(rows, back) @ keys.mT)
        return torch.cat(found, -1)

    def mixed(self, weights: Tensor) -> Tensor:
        """Values weighted and summed, in the subspace."""
        return self.values.mixed(weights)

    def dense_keys(self, dtype: torch.dtype) -> Tensor:
        """Keys as they came."""
        keys = self.keys.rebuilt(0, self.tokens, dtype)
        if self.rotation is None:
            return keys
        return self.rotation.turn(keys, torch.arange(self.offset, self.offset + self.tokens, device=keys.device))

    def dense_values(self, dtype: torch.dtype) -> Tensor:
        """Values."""
        return self.values.rebuilt(0, self.tokens, dtype)


def attend(
    query: Tensor,
    pieces: Sequence[Piece],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention, in fp32 from the scores to the weights; under autocast in its dtype, as torch's own.

    Args:
        query: ``[batch, query heads, q, size]``, a multiple of the pieces' heads; of the last ``q`` tokens.
        pieces: all tokens, in order.
        mask: ``[batch, 1 or query heads, q, tokens]``: true where to attend, or what to add to the scores.
        scale: of the scores; ``None`` is ``size^(-1/2)``.
        causal: without a mask: whether a query sees the tokens up to its own only.
        softcap: bounds the scores by ``softcap tanh(score / softcap)``.
        sinks: ``[query heads]``: a logit a head that takes part in the softmax and has no value.
    """
    query = as_autocast(query)
    with without_autocast(query.device):
        return _in_turns(query, pieces, mask, scale, causal, softcap, sinks)


def _in_turns(
    query: Tensor,
    pieces: Sequence[Piece],
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    tokens = sum(piece.tokens for piece in pieces)
    count = query.shape[2]
    if mask is None and causal and count > 1:
        mask = causal_mask(count, tokens, query.device)
    if mask is not None and mask.shape[-1] != tokens:
        raise LowRankError(f"attend: got a mask for {mask.shape[-1]} tokens, expected the {tokens} of the cache.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (only,) = pieces if len(pieces) == 1 else (None,)
    if isinstance(only, Exact) and softcap is None and sinks is None:
        grouped = query.shape[1] != only.keys.shape[1]
        keys, values = only.keys.to(query.dtype), only.values.to(query.dtype)
        mask = mask.to(query.dtype) if mask is not None and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=grouped)
    step = max(1, MOST_SCORES // max(1, query.shape[0] * query.shape[1] * tokens))
    if step >= count:
        return _attend(query, pieces, mask, scale, softcap, sinks)
    out = [
        _attend(part, pieces, None if mask is None else mask[:, :, start : start + step], scale, softcap, sinks)
        for start, part in zip(range(0, count, step), query.split(step, 2), strict=True)
    ]
    return torch.cat(out, 2)


def _attend(
    query: Tensor,
    pieces: Sequence[Piece],
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, count, size = query.shape
    # half precision has no fast products on a CPU, and the coefficients are few
    work = torch.float32 if query.device.type == "cpu" else query.dtype
    shared = pieces[0].heads
    rows = (query * scale).to(work).reshape(batch, shared, -1, size)  # the heads of a group, one below the other
    scores = torch.cat([piece.scores(rows) for piece in pieces], -1).float()
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        full = scores.view(batch, heads, count, -1)
        lowest = torch.finfo(torch.float32).min
        full = full + mask if mask.is_floating_point() else full.masked_fill(~mask, lowest)
        scores = full.view(scores.shape)
    if sinks is not None:
        extra = sinks.float().view(1, shared, -1, 1, 1).expand(batch, -1, -1, count, 1).reshape(batch, shared, -1, 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.to(work)
    parts = weights.split([piece.tokens for piece in pieces], -1)
    out = sum(piece.mixed(part) for piece, part in zip(pieces, parts, strict=True))
    assert isinstance(out, Tensor)
    return out.reshape(batch, heads, count, -1).to(query.dtype)
