"""Attention with a low-rank cache, for modules that call ``F.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..rank import Rank
from ..settings import settings_from
from .low_rank_kv import LowRankKV
from .rope import Rotation
from .settings import KVSettings


class LowRankAttention(nn.Module):
    """Causal attention with a low-rank key/value cache of its own.

    It takes the place of a cache and of ``F.scaled_dot_product_attention`` in a module: every call adds the new tokens,
    attends to all tokens, and compresses old ones afterwards. It has no parameters; a model needs one for each of its
    attention layers.

    Args:
        settings: a :class:`KVSettings`, which documents the options, or a rank; ``None`` takes the defaults.
        rotation: the rotary position embedding that queries and keys carry when they come, so that it can be taken off
            the keys; ``None`` where there is none.
        **changes: options of :class:`KVSettings` by name; they replace those of ``settings``.

    Shape:
        query ``[batch, query heads, tokens, size]``, key and value ``[batch, heads, tokens, size]`` of the new tokens;
        the output is like the query.

    Examples:
        >>> attention = lr.LowRankAttention(rank=8, keep_recent=32, rotation=lr.Rotation.of(16))
        >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
        >>> exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(attention(q, k, v), exact, atol=1e-6)  # the prompt
        True
        >>> attention(q[:, :, :1], k[:, :, :1], v[:, :, :1]).shape, len(attention.cache)  # one more token
        (torch.Size([1, 2, 1, 16]), 101)
    """

    def __init__(
        self, settings: KVSettings | Rank | None = None, rotation: Rotation | None = None, **changes: Any
    ) -> None:
        super().__init__()
        self.cache = LowRankKV(settings_from(KVSettings, settings, changes, "LowRankAttention"), rotation)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Adds tokens, attends to all of them, and compresses old ones.

        Args:
            query: queries of the new tokens.
            key: their keys.
            value: their values.
            mask: ``[batch, 1 or query heads, q, tokens]``: true where to attend, or what to add to the scores; ``None``
                is causal.
            scale: factor of the scores; ``None`` is ``size^(-1/2)``.
        """
        self.cache.append(key, value)
        out = self.cache.attend(query, mask=mask, scale=scale)
        self.cache.hide(mask)
        self.cache.compress()
        return out

    def reset(self) -> None:
        """Forgets all tokens, for a new sequence."""
        self.cache.reset()
