"""What a mask means to an attention of transformers, a missing one among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_causal(module: Any, given: bool | None) -> bool:
    """Whether a query without a mask sees the tokens up to its own only: what was passed, else the module's word.

    Encoders and cross-attentions say no; a decoder that is called with ``is_causal=False`` looks both ways.

    Args:
        module: the attention.
        given: its keyword ``is_causal``.
    """
    return bool(getattr(module, "is_causal", True) if given is None else given)


def causal_mask(count: int, tokens: int, device: torch.device) -> Tensor:
    """``[1, 1, count, tokens]``, true up to its own token for each of the last ``count`` ones."""
    return torch.ones(count, tokens, dtype=torch.bool, device=device).tril(tokens - count)[None, None]


def biased(mask: Tensor | None, bias: Tensor, *, causal: bool) -> Tensor:
    """A position bias and a mask as what is added to the scores.

    Args:
        mask: true where to attend, or what to add; ``None`` leaves it to ``causal``.
        bias: ``[1 or batch, heads, count, tokens]``.
        causal: whether a query sees the tokens up to its own only, where there is no mask.
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
    """A mask that leaves the tokens which an indexer picked (sparse attention of DeepSeek V3.2).

    Args:
        mask: as in :func:`biased`.
        indices: ``[batch, count, picked]``.
        tokens: how many there are.
        causal: as in :func:`biased`.
    """
    batch, count = indices.shape[:2]
    chosen = torch.zeros(batch, count, tokens, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen & causal_mask(count, tokens, chosen.device) if causal and count > 1 else chosen
    return chosen & mask if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
