"""The most recent tokens, exact, in a buffer that is written in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RecentTokens:
    """Keys or values ``[batch, heads, tokens, size]``, with room for more.

    Args:
        like: a tensor with the batch, heads, size, dtype and device.
        room: number of tokens that the buffer is made for.
    """

    def __init__(self, like: Tensor, room: int) -> None:
        self.room, self.tokens = room, 0
        self.buffer = like.new_empty(*like.shape[:2], room, like.shape[3])

    def __getstate__(self) -> dict[str, object]:
        # without what the compiled function holds: pointers
        return {name: value for name, value in vars(self).items() if name != "_target"}

    def append(self, x: Tensor) -> None:
        """Adds tokens; beyond the room the buffer becomes as long as need be.

        Args:
            x: ``[batch, heads, tokens, size]``.
        """
        stop = self.tokens + x.shape[2]
        if stop > self.buffer.shape[2] or self.needs_copy(x):
            self._replace(torch.cat([self.read(), x], 2))
        else:
            self.buffer[:, :, self.tokens : stop] = x
        self.tokens = stop

    def needs_copy(self, x: Tensor) -> bool:
        """Whether tokens cannot be written into the buffer as it is.

        Args:
            x: the tokens.
        """
        return x.requires_grad or self.buffer.requires_grad or self._is_frozen()

    def _is_frozen(self) -> bool:
        """Whether it was made in inference mode and that has ended (a compiled graph cannot ask)."""
        compiling = torch.compiler.is_compiling()
        return not compiling and self.buffer.is_inference() and not torch.is_inference_mode_enabled()

    def read(self) -> Tensor:
        """All tokens."""
        return self.buffer[:, :, : self.tokens]

    def drop(self, first: int) -> None:
        """Removes the first tokens.

        Args:
            first: how many.
        """
        rest = self.buffer[:, :, first : self.tokens]
        fresh = RecentTokens(rest, max(self.room, rest.shape[2]))
        fresh.append(rest)
        self.tokens = fresh.tokens
        self._replace(fresh.buffer)

    def truncate(self, tokens: int) -> None:
        """Keeps the first tokens.

        Args:
            tokens: how many.
        """
        self.tokens = tokens

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces the buffer by rows of itself.

        Args:
            change: gives the new tensor for the old one.
        """
        self._replace(change(self.buffer))

    def _replace(self, buffer: Tensor) -> None:
        vars(self).pop("_target", None)  # which would keep the former one
        self.buffer = buffer
