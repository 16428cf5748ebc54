"""A token added to the recent ones on a CPU, in one compiled function.

The same in operations of torch, which serves everywhere else, is in ``low_rank_kv.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled_functions import compiled_functions
from .recent_tokens import RecentTokens


def append_token(recent: tuple[RecentTokens, RecentTokens], keys: Tensor, values: Tensor) -> bool:
    """Adds one token to recent keys and values, if all of its numbers are finite.

    Args:
        recent: the keys and the values.
        keys: ``[batch, heads, 1, size]``.
        values: ``[batch, heads, 1, size]``, possibly of another size.

    Returns:
        Whether it was added. Nothing is written where a number is NaN or Inf, or where the function does not serve:
        for several tokens, other shapes or dtypes than those that are held, gradients, or no room.
    """
    if torch.compiler.is_compiling():
        return False
    (first, second), functions = recent, compiled_functions()
    if functions is None or not (_serves(first, keys) and _serves(second, values)):
        return False
    tokens, (batch, heads, room, size) = first.tokens, first.buffer.shape
    if second.tokens != tokens or second.buffer.shape[:3] != first.buffer.shape[:3]:
        return False
    pointers = (x.data_ptr() for x in (keys, values, first.buffer, second.buffer))
    if not functions.append_token(*pointers, tokens, room, batch * heads, size, second.buffer.shape[3]):
        return False
    first.tokens = second.tokens = tokens + 1
    return True


def _serves(recent: RecentTokens, x: Tensor) -> bool:
    buffer = recent.buffer
    batch, heads, room, size = buffer.shape
    alike = type(x) is Tensor and x.shape == (batch, heads, 1, size) and x.dtype == buffer.dtype == torch.float32
    plain = x.device.type == buffer.device.type == "cpu" and x.is_contiguous() and buffer.is_contiguous()
    return alike and plain and recent.tokens < room and not recent.needs_copy(x)
