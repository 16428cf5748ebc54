"""The attention implementation ``"lowrank"``: over coefficients where it can, exact where it must."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import LowRankError
from .lazy import stored

NAME = "lowrank"


def lowrank_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a :class:`LowRankCache`'s tokens, ``[batch, q, heads, size]``, and no weights.

    Keys and values that are plain tensors (another cache, none, or a training step) are attended to exactly.
    """
    kv = stored(key, value)
    if kv is None or kwargs.get("position_bias") is not None:
        return _exact(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if dropout and module.training:
        raise LowRankError(
            f"LowRankCache: got dropout {dropout} in training, which attention over coefficients has not; call"
            " model.eval(), or train without a cache."
        )
    if attention_mask is not None:
        attention_mask = attention_mask[..., : len(kv)]
    causal = kwargs.get("is_causal")
    out = kv.attend(
        query,
        mask=attention_mask,
        scale=scaling,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    kv.compress()  # only now: what came in this step was attended to as it is
    return out.transpose(1, 2).contiguous(), None


def _exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    options = ("softcap", "s_aux", "position_bias")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None or all(kwargs.get(option) is None for option in options):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    out: Tensor = eager(
        module, query, key, value, _added(mask, query, key), scaling=scaling, dropout=dropout, **kwargs
    )[0]
    return out, None


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as what is added to the scores, which is all that the models' own functions know."""
    count, tokens = query.shape[2], key.shape[2]
    if mask is None:
        if count == 1:
            return None
        mask = torch.ones(count, tokens, dtype=torch.bool, device=query.device).tril(tokens - count)[None, None]
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)


def lowrank_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask of booleans, or none."""
    found: Tensor | None = sdpa_mask(*args, **kwargs)
    return found


# a name without a mask function would silently lose the padding
AttentionInterface.register(NAME, lowrank_attention)
AttentionMaskInterface.register(NAME, lowrank_mask)
