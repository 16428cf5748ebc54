"""The errors of :class:`LowRankCache`: what it does not take, and what to write instead."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import nn

from ...errors import LowRankError
from .calling_model import is_cross_attention


def offloading(given: bool) -> LowRankError:
    """For offloading, which T5Gemma's generate asks of a second cache that it makes of the first one's class."""
    return LowRankError(
        f"LowRankCache: got offloading={given}, expected None, as the cache stays where the model is. If T5Gemma's"
        " generate asked for it to make a second cache, give EncoderDecoderCache(LowRankCache(...), DynamicCache())."
    )


def budget_and_subspaces() -> LowRankError:
    """For a budget and subspaces, which both choose the ranks."""
    return LowRankError("LowRankCache: got budget= and subspaces=, expected one; the subspaces have their ranks.")


def budget_for_encoder() -> LowRankError:
    """For cross-attention under a budget, which is shared when the second step comes."""
    return LowRankError(
        "LowRankCache: got budget= for cross-attention, which never gets the second step that the budget is shared at;"
        " give rank=."
    )


def compiled() -> LowRankError:
    """For a compiled model without a prompt: a graph can neither look at frames nor make a layer."""
    return LowRankError(
        "LowRankCache: got a compiled model before any prompt, expected one call that is not compiled; run the prompt"
        " with the plain model."
    )


def few_subspaces(count: int, layer: int) -> LowRankError:
    """For a layer without a pair of subspaces."""
    return LowRankError(
        f"LowRankCache: got subspaces of {count} layers and keys of layer {layer}, expected a pair for each layer."
    )


def other_depth(got: int | None, held: int | None) -> LowRankError:
    """For the first layer of another model."""
    return LowRankError(
        f"LowRankCache: got a model of {got} layers, but the cache holds tokens of one with {held}; a cache belongs to"
        " one model: make a new one."
    )


def more_layers(layer: int, held: int) -> LowRankError:
    """For a later layer of another model."""
    return LowRankError(
        f"LowRankCache: got keys of layer {layer}, but the cache holds tokens of a model with {held} layers; a cache"
        " belongs to one model: make a new one."
    )


def too_long(more: int, held: int, limit: int) -> LowRankError:
    """For more tokens than ``max_length`` in a layer that stays exact."""
    return LowRankError(f"LowRankCache: got {more} more tokens after {held}, expected at most max_length={limit}.")


def alone(module: nn.Module | None) -> LowRankError:
    """For one cache in both attentions of a decoder."""
    return LowRankError(
        f"LowRankCache: got the cross-attention of {type(module).__name__}, whose keys and values need a cache of their"
        " own; give past_key_values=EncoderDecoderCache(LowRankCache(...), LowRankCache(...)), or a DynamicCache() as"
        " the second to keep the encoder's exact."
    )


def check_not_alone(cache: Any, frame: FrameType) -> None:
    """Raises if a cache is the only one of a decoder that is about to attend to what an encoder gave.

    Such a model would append the encoder's keys to its own, or take a new ``DynamicCache`` without a word (Whisper).

    Args:
        cache: the cache that is asked for its length.
        frame: the frame that asks.
    """
    owner = frame.f_locals.get("self")
    if frame.f_locals.get("past_key_values") is not cache or not isinstance(owner, nn.Module):
        return
    if is_cross_attention(cache, owner, frame):
        raise alone(owner)
