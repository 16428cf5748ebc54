"""Multi-head attention that calls its four projections as modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LowRankError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class UnfusedAttention(nn.Module):
    """Base class of :class:`LowRankMultiheadAttention`: the forward of ``nn.MultiheadAttention``, projections apart."""

    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None
    """Attributes by which torch's transformer layers decide against their fused path."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes attention as ``nn.MultiheadAttention.forward`` does; nested tensors are not supported."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise LowRankError(
                "LowRankMultiheadAttention: got a nested tensor; give padded tensors and key_padding_mask instead."
            )
        if is_causal and attn_mask is None:
            raise LowRankError(
                "LowRankMultiheadAttention: got is_causal=True without attn_mask; give the causal mask as well."
            )
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value)
        plain = self.bias_k is None and not self.add_zero_attn
        causal = is_causal and key_padding_mask is None and not need_weights and plain
        mask = None if causal else _join_masks(attn_mask, key_padding_mask, q, k)
        chance = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), chance)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, chance, causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects to queries, keys and values per head, ``[N, heads, L, head_dim]``."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), -1, -1)], 1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return (q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))) if self.add_zero_attn else (q, k, v)


def _join_masks(attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Combines both masks into one that is added to the scores ``[N, heads, L, S]``; added keys are never masked."""
    joint = None
    if attention is not None:
        split = attention.unflatten(0, (-1, q.shape[1])) if attention.ndim == 3 else attention
        joint = _additive(split, q, k)
    if padding is not None:
        mask = _additive(padding, q, k)[:, None, None]
        joint = mask if joint is None else joint + mask
    return joint


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Converts a mask to the dtype of the scores, ``-inf`` where it is ``True``, and pads it for added keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    return F.pad(mask.to(q.dtype), (0, k.shape[-2] - mask.shape[-1]))
