"""What a cache finds out about the model that calls it: its attention module, and whether that reads an encoder."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import Tensor, nn
from transformers import EncoderDecoderCache

ENCODED = ("key_value_states", "encoder_hidden_states")
"""Arguments through which cross-attentions, and decoders with some, get what the encoder gave."""


def calling_module(frame: FrameType | None) -> nn.Module | None:
    """The innermost module whose forward is running.

    A cache's ``update`` gets tensors only, and no sign of whose they are.

    Args:
        frame: where the cache was called.
    """
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


def is_cross_attention(cache: Any, module: nn.Module | None, frame: FrameType | None) -> bool:
    """Whether a cache is called by a cross-attention, which attends to what an encoder gave.

    Args:
        cache: the cache that is called.
        module: the module whose forward is running.
        frame: the frame in which the module calls the cache, or a deeper one.
    """
    if module is None:
        return False
    while frame is not None and frame.f_locals.get("self") is not module:
        frame = frame.f_back
    if frame is None:
        return False
    seen = frame.f_locals
    pair = next((each for each in seen.values() if isinstance(each, EncoderDecoderCache)), None)
    if pair is not None:  # one attention may do both (T5Gemma 2)
        return pair.cross_attention_cache is cache
    return any(seen.get(name) is not None for name in ENCODED)


def mask_of(frame: FrameType) -> Tensor | None:
    """The mask that an attention was called with, which a cache's ``update`` does not get.

    Args:
        frame: the frame in which the attention calls the cache.
    """
    found = frame.f_locals.get("attention_mask")
    return found if isinstance(found, Tensor) and found.ndim in (2, 4) else None


def text_config(config: Any) -> Any:
    """The configuration of the decoder, where a model has several.

    Args:
        config: configuration of the model.
    """
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def depth_of(config: Any) -> int | None:
    """The number of a decoder's layers; some configurations count their encoder's as the model's.

    Args:
        config: configuration of the decoder.
    """
    return getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
