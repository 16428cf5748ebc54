"""The most recent tokens, exact, in a buffer that is written in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Tail:
    """Keys or values, ``[batch, heads, tokens, size]``, with room for more.

    Args:
        like: a tensor with the batch, heads, size, dtype and device.
        room: for how many tokens.
    """

    def __init__(self, like: Tensor, room: int) -> None:
        self.room, self.tokens = room, 0
        self.buffer = like.new_empty(*like.shape[:2], room, like.shape[3])

    def append(self, x: Tensor) -> None:
        """More tokens; beyond the room the buffer becomes as long as need be."""
        stop = self.tokens + x.shape[2]
        if stop > self.buffer.shape[2] or x.requires_grad or self.buffer.requires_grad or self._is_frozen():
            self.buffer = torch.cat([self.read(), x], 2)
        else:
            self.buffer[:, :, self.tokens : stop] = x
        self.tokens = stop

    def _is_frozen(self) -> bool:
        """Whether it was made in inference mode and that has ended (a compiled graph cannot ask)."""
        compiling = torch.compiler.is_compiling()
        return not compiling and self.buffer.is_inference() and not torch.is_inference_mode_enabled()

    def read(self) -> Tensor:
        """All tokens."""
        return self.buffer[:, :, : self.tokens]

    def drop(self, first: int) -> None:
        """Lets go of the first tokens."""
        rest = self.buffer[:, :, first : self.tokens]
        fresh = Tail(rest, max(self.room, rest.shape[2]))
        fresh.append(rest)
        self.buffer, self.tokens = fresh.buffer, fresh.tokens

    def truncate(self, tokens: int) -> None:
        """Leaves the first ones."""
        self.tokens = tokens

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces the rows of the batch."""
        self.buffer = change(self.buffer)
