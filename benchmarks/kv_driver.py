"""Runs a model with benchmarks' own key/value caches in place of transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_stores import DTYPE, Exact, Store

OBSERVED = 32
"""Number of the prompt's last queries that an eviction may look at."""
NAME = "benchmark_stores"


@dataclass
class Prompt:
    """What a layer has of the prompt: exact keys and values, rotated, and the last queries."""

    keys: Tensor
    values: Tensor
    queries: Tensor


class Driver:
    """Runs the model with these caches in place of transformers' own, independently of its version."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        self.model = model
        self.stores: Sequence[Store] = []
        self.queries: dict[int, Tensor] = {}
        AttentionInterface.register(NAME, self.attention)

    def attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        store, count = self.stores[module.layer_idx], query.shape[2]
        self.queries[module.layer_idx] = query[:, :, -OBSERVED:]
        keys, values = (t.to(query.dtype) for t in store.update(key.to(DTYPE), value.to(DTYPE)))
        total = keys.shape[2]
        # the tokens of this step are the last ones; of the others a cache may keep some only
        mask = None
        if 1 < count < total:
            mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
        out = F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=count == total > 1, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None

    def logits(self, tokens: Tensor, start: int, keep: int = 0) -> Tensor:
        """The logits of tokens from the position ``start`` on; ``keep`` is the number of last ones, 0 for all."""
        if self.model.config._attn_implementation != NAME:
            self.model.set_attn_implementation(NAME)
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        found: Tensor = self.model(tokens, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
        return found


@torch.no_grad()
def prefilled(driver: Driver, tokens: Tensor) -> list[Prompt]:
    """The exact keys and values of each layer."""
    stores = [Exact() for _ in range(driver.model.config.num_hidden_layers)]
    driver.stores = stores
    driver.logits(tokens, 0, keep=1)
    return [Prompt(*store.kept, driver.queries[layer]) for layer, store in enumerate(stores) if store.kept is not None]
