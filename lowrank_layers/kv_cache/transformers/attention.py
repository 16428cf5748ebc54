"""The attention implementation ``"lowrank"``: over coefficients where it can, exact where it must."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import LowRankError
from ..masks import biased, causal_mask, is_causal, selected
from .lazy_kv import cache_behind
from .versions import query_length

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

    Keys and values that are plain tensors (another cache, none, or a training step) are attended to exactly. A mask
    that is ``None`` means what it means to SDPA: all tokens up to a query's own where the keyword ``is_causal``, else
    the attribute of the module, says so, and otherwise all tokens.
    """
    if kwargs.get("block_indices") is not None:
        raise LowRankError(
            f"LowRankCache: got block_indices from {type(module).__name__}, which picks blocks of tokens in a way that"
            " the attention 'lowrank' does not know; call model.set_attn_implementation('sdpa')."
        )
    kv = cache_behind(key, value)
    causal = is_causal(module, kwargs.pop("is_causal", None))
    tokens = key.shape[2] if kv is None else len(kv)
    if attention_mask is not None and kv is not None:
        attention_mask = attention_mask[..., :tokens]
    if (picked := kwargs.pop("indices", None)) is not None:
        attention_mask = selected(attention_mask, picked, tokens, causal=causal)
    if (bias := kwargs.pop("position_bias", None)) is not None:
        attention_mask = biased(attention_mask, bias.to(query.dtype), causal=causal)
        causal = False
    if kv is None:
        return _exact(module, query, key, value, attention_mask, scaling, dropout, causal, kwargs)
    if dropout and module.training:
        raise LowRankError(
            f"LowRankCache: got dropout {dropout} in training, which attention over coefficients has not; call"
            " model.eval(), or train without a cache."
        )
    if kwargs.get("sinks") is not None:
        raise LowRankError(
            f"LowRankCache: got sinks from {type(module).__name__} that differ from query to query, which attention"
            " over coefficients has not; call model.set_attn_implementation('eager')."
        )
    out = kv.attend(
        query,
        mask=attention_mask,
        scale=scaling,
        causal=causal,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    # only now, what came in this step having been attended to as it is; layers that share it come later in the step
    if not (getattr(module, "store_full_length_kv", False) or getattr(module, "is_kv_shared_layer", False)):
        kv.compress()
    return out.transpose(1, 2).contiguous(), None


def _exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    count, tokens = query.shape[2], key.shape[2]
    options = {name: kwargs[name] for name in ("softcap", "s_aux", "sinks") if kwargs.get(name) is not None}
    if mask is None and causal and (options or count != tokens) and count > 1:
        mask = causal_mask(count, tokens, query.device)
    if not options:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
        )
        return found
    out: Tensor = _eager(module, options)(
        module, query, key, value, _added(mask, query.dtype), scaling=scaling, dropout=dropout, **kwargs
    )[0]
    return out, None


def _eager(module: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    """The function of the file that the attention, or a class that it is made from, stands in."""
    for kind in type(module).__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise LowRankError(
        f"LowRankCache: got {', '.join(options)} from {type(module).__name__}, whose file has no"
        " eager_attention_forward to compute it; call model.set_attn_implementation('eager')."
    )


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as what is added to the scores, which is all that the models' own functions know."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def lowrank_mask(**kwargs: Any) -> Tensor | None:
    """A mask of booleans, or none where every query sees all tokens, or those up to its own, the last ones being its.

    SDPA also takes none for the first tokens of a longer cache, since its causal mask begins in the upper left corner.
    """
    given = kwargs.get("q_length", kwargs.get("cache_position"))  # the latter until 5.3
    if given is not None and query_length(given) not in (1, kwargs.get("kv_length")):
        kwargs["allow_is_causal_skip"] = False
    found: Tensor | None = sdpa_mask(**kwargs)
    return found


# a name without a mask function would silently lose the padding
AttentionInterface.register(NAME, lowrank_attention)
AttentionMaskInterface.register(NAME, lowrank_mask)
