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
    """Attention to the tokens of a :class:`LowRankCache`, as transformers calls its attention implementations.

    Keys and values that are plain tensors (another cache, none, or a training step) are attended to exactly. Without a
    mask a query sees the tokens up to its own where the keyword ``is_causal``, or else the module's attribute of that
    name, is true, and otherwise all tokens.

    Args:
        module: the attention.
        query: ``[batch, query heads, q, size]``.
        key: the keys that the cache returned: a tensor, or what stands for coefficients.
        value: the values that the cache returned, likewise.
        attention_mask: ``[batch, 1, q, tokens]``: true where to attend, or what to add to the scores.
        scaling: factor of the scores; ``None`` is ``size^(-1/2)``.
        dropout: probability with which attention weights are dropped in training, for plain tensors only.
        **kwargs: what models hand to their attentions: ``softcap``, ``s_aux``, ``indices``, ``position_bias``...

    Returns:
        ``[batch, q, query heads, size]``, and ``None`` in place of attention weights.
    """
    if kwargs.get("block_indices") is not None:
        raise LowRankError(
            f"LowRankCache: got block_indices from {type(module).__name__}, which picks blocks of tokens in a way that"
            " the attention 'lowrank' does not know; call model.set_attn_implementation('sdpa')."
        )
    kv = cache_behind(key, value)
    causal = is_causal(module, kwargs.pop("is_causal", None))
    if attention_mask is not None and kv is not None:
        attention_mask = attention_mask[..., : len(kv)]
    given = attention_mask
    if (picked := kwargs.pop("indices", None)) is not None:
        tokens = key.shape[2] if kv is None else len(kv)
        attention_mask = selected(attention_mask, picked, tokens, causal=causal)
    if (bias := kwargs.pop("position_bias", None)) is not None:
        attention_mask = biased(attention_mask, bias.to(query.dtype), causal=causal)
        causal = False
    if kv is None:
        options = kwargs | {"scaling": scaling, "dropout": dropout}
        return _exact(module, (query, key, value), attention_mask, causal, options)
    if dropout and module.training:
        raise LowRankError(
            f"LowRankCache: got dropout {dropout} in training, which attention over coefficients does not apply;"
            " call model.eval(), or train without a cache."
        )
    if kwargs.get("sinks") is not None:
        raise LowRankError(
            f"LowRankCache: got sinks from {type(module).__name__} that differ from query to query, which attention"
            " over coefficients does not know; call model.set_attn_implementation('eager')."
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
    attributes = vars(module)  # asking a module for what it lacks takes as long as much of this
    if not (attributes.get("store_full_length_kv") or attributes.get("is_kv_shared_layer")):
        if not torch.compiler.is_compiling():
            kv.hide(given)
        kv.compress()
    return out.transpose(1, 2).contiguous(), None


def _exact(
    module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, causal: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attention to plain tensors: torch's own, or the model's where it has more than a softmax."""
    query, key, _ = qkv
    count, tokens = query.shape[2], key.shape[2]
    special = [name for name in ("softcap", "s_aux", "sinks") if options.get(name) is not None]
    if mask is None and causal and (special or count != tokens) and count > 1:
        mask = causal_mask(count, tokens, query.device)
    if special:
        out: Tensor = _eager(module, special)(module, *qkv, _added(mask, query.dtype), **options)[0]
        return out, None
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, *qkv, mask, is_causal=causal, **options)
    return found


def _eager(module: nn.Module, special: list[str]) -> Callable[..., Any]:
    """The eager attention of the file in which the attention's class, or a class that it inherits from, is defined."""
    for kind in type(module).__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise LowRankError(
        f"LowRankCache: got {', '.join(special)} from {type(module).__name__}, whose file has no"
        " eager_attention_forward to compute it; call model.set_attn_implementation('eager')."
    )


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as a tensor that is added to the scores, the only kind that the models' own functions know."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def lowrank_mask(**kwargs: Any) -> Tensor | None:
    """The mask for the attention ``"lowrank"``, as transformers asks for masks: boolean, or ``None``.

    ``None`` stands for a causal mask whose last query is the last token, or for no mask at all. SDPA also takes
    ``None`` for the first tokens of a longer cache, since its causal mask begins in the upper left corner; here they
    get a mask.

    Args:
        **kwargs: the arguments of transformers' mask functions.
    """
    given = kwargs.get("q_length", kwargs.get("cache_position"))  # the latter until 5.3
    if given is not None and query_length(given) not in (1, kwargs.get("kv_length")):
        kwargs["allow_is_causal_skip"] = False
    found: Tensor | None = sdpa_mask(**kwargs)
    return found


# a name without a mask function would silently lose the padding
AttentionInterface.register(NAME, lowrank_attention)
AttentionMaskInterface.register(NAME, lowrank_mask)
