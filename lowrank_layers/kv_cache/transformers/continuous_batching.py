"""Continuous batching, for which transformers keeps exact pages of its own, is refused where low rank is meant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from ...errors import LowRankError
from .attention import NAME
from .calling_model import text_config

ENTRIES = ("generate_batch", "init_continuous_batching")
"""Methods of a model that begin continuous batching; ``generate(cache_implementation="paged")`` calls the first."""
PARTS = ("self_attention_cache", "cross_attention_cache")
"""The caches of a pair of them, as encoder-decoders take it."""


def refuse_continuous_batching(kind: type) -> None:
    """Makes a model's :data:`ENTRIES` raise where they would leave low rank out without a word.

    They drop ``past_key_values``, and in place of an attention that they do not know they take flash attention where
    it is installed. All other calls are as they were.

    Args:
        kind: the class of caches that are refused.
    """
    for name in ENTRIES:
        setattr(ContinuousMixin, name, _guarded(getattr(ContinuousMixin, name), kind))


def _guarded(entry: Callable[..., Any], kind: type) -> Callable[..., Any]:
    @functools.wraps(entry)
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("past_key_values")
        if any(isinstance(getattr(given, part, given), kind) for part in PARTS):
            raise _error(entry, "a LowRankCache")
        if NAME in (model.config._attn_implementation, text_config(model.config)._attn_implementation):
            raise _error(entry, f"the attention {NAME!r}")
        return entry(model, *args, **kwargs)

    return guarded


def _error(entry: Callable[..., Any], got: str) -> LowRankError:
    return LowRankError(
        f"LowRankCache: got {got} in {entry.__name__}, but continuous batching keeps exact pages of its own; call"
        " model.generate(input_ids, attention_mask=..., past_key_values=LowRankCache(...)) with prompts padded on the"
        " left, or model.set_attn_implementation('sdpa') and no cache for exact continuous batching."
    )
