"""Attention over the segments of a cache, with one softmax over the tokens of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LowRankError
from .autocast import as_autocast, without_autocast
from .masks import causal_mask
from .segments import ExactSegment, Segment

MOST_SCORES = 2**25
"""Most scores formed at once (128 MiB in fp32): longer runs of queries go in turns."""


def attend(
    query: Tensor,
    segments: Sequence[Segment],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention, in fp32 from the scores to the weights; under autocast in its dtype, as torch's own.

    Args:
        query: queries of the last ``q`` tokens, ``[batch, query heads, q, size]``; a multiple of the segments' heads.
        segments: all tokens, in order.
        mask: ``[batch, 1 or query heads, q, tokens]``: true where to attend, or what to add to the scores.
        scale: factor of the scores; ``None`` is ``size^(-1/2)``.
        causal: where there is no mask, whether a query sees the tokens up to its own only.
        softcap: bounds the scores by ``softcap tanh(score / softcap)``.
        sinks: ``[query heads]``, one logit per head that takes part in the softmax and has no value.
    """
    tokens, count = sum(segment.tokens for segment in segments), query.shape[2]
    if mask is not None and mask.shape[-1] != tokens:
        raise LowRankError(f"attend: got a mask for {mask.shape[-1]} tokens, expected the {tokens} of the cache.")
    triangle = mask is None and causal and count > 1
    query = as_autocast(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(query.device):
        (only,) = segments if len(segments) == 1 else (None,)
        plain = isinstance(only, ExactSegment) and softcap is None and sinks is None
        # torch's own causal attention skips what a mask would hide
        if triangle and not (plain and count == tokens):
            mask = causal_mask(count, tokens, query.device)
        if plain:
            assert isinstance(only, ExactSegment)
            return _fused(query, only, mask, scale, causal=triangle and mask is None)
        return _Attention(segments, scale, softcap, sinks).in_turns(query, mask)


def _fused(query: Tensor, segment: ExactSegment, mask: Tensor | None, scale: float, *, causal: bool) -> Tensor:
    keys, values = segment.keys.to(query.dtype), segment.values.to(query.dtype)
    mask = mask.to(query.dtype) if mask is not None and mask.is_floating_point() else mask
    grouped = query.shape[1] != segment.heads
    return F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


@dataclass(frozen=True, eq=False)
class _Attention:
    """Attention that reads each segment in its own way."""

    segments: Sequence[Segment]
    scale: float
    softcap: float | None
    sinks: Tensor | None

    def in_turns(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """For as many queries at a time as give at most ``MOST_SCORES`` scores."""
        batch, heads, count, _ = query.shape
        tokens = sum(segment.tokens for segment in self.segments)
        step = max(1, MOST_SCORES // max(1, batch * heads * tokens))
        if step >= count:
            return self.at_once(query, mask)
        out = [
            self.at_once(part, None if mask is None else mask[:, :, start : start + step])
            for start, part in zip(range(0, count, step), query.split(step, 2), strict=True)
        ]
        return torch.cat(out, 2)

    def at_once(self, query: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, count, _ = query.shape
        # half precision has no fast products on a CPU, and the coefficients are few
        work = torch.float32 if query.device.type == "cpu" else query.dtype
        shared = self.segments[0].heads
        # the query heads of a key's head, one below the other
        rows = (query * self.scale).to(work).reshape(batch, shared, -1, query.shape[3])
        scores = torch.cat([segment.scores(rows) for segment in self.segments], -1).float()
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        if mask is not None:
            full = scores.view(batch, heads, count, -1)
            lowest = torch.finfo(torch.float32).min
            full = full + mask if mask.is_floating_point() else full.masked_fill(~mask, lowest)
            scores = full.view(scores.shape)
        weights = self._softmax(scores, count).to(work)
        parts = weights.split([segment.tokens for segment in self.segments], -1)
        out = sum(segment.mixed(part) for segment, part in zip(self.segments, parts, strict=True))
        assert isinstance(out, Tensor)
        return out.reshape(batch, heads, count, -1).to(query.dtype)

    def _softmax(self, scores: Tensor, count: int) -> Tensor:
        if self.sinks is None:
            return scores.softmax(-1)
        batch, shared = scores.shape[:2]
        sinks = self.sinks.float().view(1, shared, -1, 1, 1).expand(batch, -1, -1, count, 1)
        return torch.cat([scores, sinks.reshape(batch, shared, -1, 1)], -1).softmax(-1)[..., :-1]
