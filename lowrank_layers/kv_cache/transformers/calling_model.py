"""What a cache finds out about the model that calls it: its attention module, and whether that reads an encoder."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import nn
from transformers import EncoderDecoderCache

ENCODED = ("key_value_states", "encoder_hidden_states")
"""Arguments of cross-attentions, and of decoders that have some."""


def calling_module(frame: FrameType | None) -> nn.Module | None:
    """The innermost module whose forward is running: ``update`` gets tensors only, and no sign of whose they are."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


def is_cross_attention(cache: Any, module: nn.Module | None, frame: FrameType | None) -> bool:
    """Whether a cache is being asked on behalf of an attention to what an encoder gave.

    Args:
        cache: that is asked.
        module: whose forward is running.
        frame: where it calls the cache, or deeper.
    """
    while frame is not None and frame.f_locals.get("self") is not module:
        frame = frame.f_back
    if module is None or frame is None:
        return False
    seen = frame.f_locals
    pair = next((each for each in seen.values() if isinstance(each, EncoderDecoderCache)), None)
    if pair is not None:  # one attention may do both (T5Gemma 2)
        return pair.cross_attention_cache is cache
    return any(seen.get(name) is not None for name in ENCODED)


def text_config(config: Any) -> Any:
    """The decoder's, where there are several."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def depth_of(config: Any) -> int | None:
    """Layers of the decoder; some of transformers' configurations count their encoder's as the model's."""
    return getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
