"""Attention masks as transformers' attentions understand them, also where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_causal(module: Any, given: bool | None) -> bool:
    """Whether a query without a mask sees the tokens up to its own only.

    Encoders and cross-attentions look both ways, and so does a decoder that is called with ``is_causal=False``.

    Args:
        module: the attention; its attribute ``is_causal`` decides where nothing was given.
        given: the keyword ``is_causal`` with which it was called.
    """
    return bool(getattr(module, "is_causal", True) if given is None else given)


def causal_mask(count: int, tokens: int, device: torch.device) -> Tensor:
    """A mask ``[1, 1, count, tokens]`` in which the last tokens see all tokens up to their own.

    Args:
        count: number of queries.
        tokens: number of keys.
        device: device of the mask.
    """
    return torch.ones(count, tokens, dtype=torch.bool, device=device).tril(tokens - count)[None, None]


def biased(mask: Tensor | None, bias: Tensor, *, causal: bool) -> Tensor:
    """A position bias and a mask as one tensor that is added to the scores.

    Args:
        mask: true where to attend, or what to add to the scores; ``None`` leaves it to ``causal``.
        bias: ``[1 or batch, heads, count, tokens]``.
        causal: where there is no mask, whether a query sees the tokens up to its own only.
    """
    count, tokens = bias.shape[2:]
    if mask is None:
        if not causal or count == 1:
            return bias
        mask = causal_mask(count, tokens, bias.device)
    if mask.dtype != torch.bool:
        return bias + mask
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)


def selected(mask: Tensor | None, indices: Tensor, tokens: int, *, causal: bool) -> Tensor:
    """A mask that leaves the tokens that an indexer picked (sparse attention of DeepSeek V3.2).

    Args:
        mask: true where to attend, or what to add to the scores; ``None`` leaves it to ``causal``.
        indices: indices of the picked tokens, ``[batch, count, picked]``.
        tokens: number of tokens.
        causal: where there is no mask, whether a query sees the tokens up to its own only.
    """
    batch, count = indices.shape[:2]
    chosen = torch.zeros(batch, count, tokens, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen & causal_mask(count, tokens, chosen.device) if causal and count > 1 else chosen
    return chosen & mask if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
