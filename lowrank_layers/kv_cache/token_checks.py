"""What a cache asks of keys and values before it takes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import LowRankError

FEW = 2**14
"""Numbers up to which the fewest operations are the fastest way, and more of them otherwise the fewest bytes."""


def check_form(keys: Tensor, values: Tensor) -> None:
    """Raises unless keys and values are of the same tokens, at least one, in floating point on one device.

    Args:
        keys: ``[batch, heads, tokens, size]``.
        values: ``[batch, heads, tokens, size]``, possibly of another size.
    """
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise LowRankError(
            f"LowRankKV: got keys {tuple(keys.shape)} and values {tuple(values.shape)}, expected"
            " [batch, heads, tokens, size] with the same batch, heads and tokens."
        )
    if keys.shape[2] == 0:
        raise LowRankError("LowRankKV: got keys of no tokens, expected at least one; give a prompt that is not empty.")
    floating = keys.is_floating_point() and values.is_floating_point()
    if not floating or keys.device != values.device:
        raise LowRankError(
            f"LowRankKV: got keys in {keys.dtype} on {keys.device} and values in {values.dtype} on {values.device},"
            " expected floating point on one device."
        )


def check_alike(new: Tensor, held: Tensor, name: str) -> None:
    """Raises unless new keys or values are like those that the cache holds, but for the number of tokens.

    Args:
        new: ``[batch, heads, tokens, size]``.
        held: keys or values of the cache.
        name: ``"keys"`` or ``"values"``, for the message.
    """
    same = new.shape[:2] == held.shape[:2] and new.shape[3] == held.shape[3]
    if not same or new.dtype != held.dtype or new.device != held.device:
        raise LowRankError(
            f"LowRankKV: got {name} {_described(new)}, but the cache holds {_described(held)}; a cache belongs to one"
            " model, batch, dtype and device: make a new one."
        )


def check_finite(keys: Tensor, values: Tensor) -> None:
    """Raises if there is NaN or Inf; in a compiled graph nothing is looked at.

    Args:
        keys: any shape.
        values: any shape.
    """
    if torch.compiler.is_compiling():
        return
    keys, values = keys.detach(), values.detach()
    # by their extremes, which NaN passes through: a sum of finite numbers need not be finite
    if keys.numel() + values.numel() <= FEW:
        finite = all(math.isfinite(end) for x in (keys, values) for end in x.aminmax())
    else:
        ends = [end.isfinite() for x in (keys, values) for end in x.aminmax()]
        finite = bool(torch.stack(ends).all())
    if not finite:
        raise LowRankError("LowRankKV: got keys or values with NaN or Inf; look at the model's input and dtype.")


def _described(x: Tensor) -> str:
    return f"[{x.shape[0]}, {x.shape[1]}, tokens, {x.shape[3]}] in {x.dtype} on {x.device}"
