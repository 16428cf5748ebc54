"""A token added to the recent ones on a CPU, in one compiled function.

The same in operations of torch, which serves everywhere else, is in ``low_rank_kv.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    first, second = recent
    tokens, target = first.tokens, _target(first, second)
    if target is None or second.tokens != tokens or tokens >= target.room:
        return False
    for x, shape in ((keys, target.keys), (values, target.values)):
        plain = type(x) is Tensor and x.is_cpu and x.dtype is torch.float32 and not x.requires_grad
        if not plain or x.shape != shape or not x.is_contiguous():
            return False
    if target.inference and not torch.is_inference_mode_enabled():
        return False
    if not target.function(keys.data_ptr(), values.data_ptr(), *target.pointers, tokens, *target.sizes):
        return False
    first.tokens = second.tokens = tokens + 1
    return True


@dataclass(frozen=True, eq=False)
class _Target:
    """Where tokens are written, which stays until a buffer is another one."""

    buffers: tuple[Tensor, Tensor]
    keys: torch.Size
    values: torch.Size
    room: int
    inference: bool  # made in inference mode: nothing else may write there
    pointers: tuple[int, int]
    sizes: tuple[int, ...]
    function: Callable[..., int]


def _target(first: RecentTokens, second: RecentTokens) -> _Target | None:
    """``None`` where the compiled function does not serve."""
    held: _Target | None = vars(first).get("_target")
    if held is not None and held.buffers[0] is first.buffer and held.buffers[1] is second.buffer:
        return held
    buffers, functions = (first.buffer, second.buffer), compiled_functions()
    (batch, heads, room, size), other = first.buffer.shape, second.buffer.shape
    plain = all(x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() and not x.requires_grad for x in buffers)
    if functions is None or not plain or other[:3] != first.buffer.shape[:3]:
        return None
    made = _Target(
        buffers,
        torch.Size((batch, heads, 1, size)),
        torch.Size((batch, heads, 1, other[3])),
        room,
        any(x.is_inference() for x in buffers),
        (first.buffer.data_ptr(), second.buffer.data_ptr()),
        (room, batch * heads, size, other[3]),
        functions.append_token,
    )
    vars(first)["_target"] = made
    return made
