"""What is remembered of a gradient from step to step: the directions it lay in, and what was not sent of it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..linalg import to_unit
from .microscaling import pack, room, unpack
from .traffic import Clock

ERROR_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Kept:
    """What memories have in common.

    Args:
        error_dtype: what was not sent is remembered in.
        warm_start: whether directions go on from the last step's.
        refresh: steps after which they are drawn anew.
        alternate: whether both factors are directions, in turn.
    """

    error_dtype: torch.dtype = torch.float32
    warm_start: bool = True
    refresh: int | None = None
    alternate: bool = False


class Memory:
    """The directions and the error of one gradient, a stack of matrices.

    Args:
        shape: ``(stack, rows, columns)``.
        rank: of its approximation.
        name: seeds the first directions, so that they are the same in every process.
        device: of the gradient.
        kept: how it is remembered.
    """

    def __init__(
        self, shape: tuple[int, int, int], rank: int, name: str, device: torch.device, kept: Kept | None = None
    ) -> None:
        self.shape, self.rank = shape, min(rank, *shape[1:])
        self.key = zlib.crc32(name.encode())
        self.kept = Kept() if kept is None else kept
        self.scale = 1.0
        self.device = device
        self.error = torch.zeros(shape, device=device)
        self.right = self._drawn(0, shape[2])
        self.left = self._drawn(0, shape[1]) if self.kept.alternate else None
        self.clock = Clock()
        self._spares: dict[int, Tensor] = {}
        self.paid: tuple[Tensor, Tensor] | None = None

    @property
    def error(self) -> Tensor:
        """What this process has not sent yet: its mean over processes is what all owe together."""
        if self.kept.error_dtype != torch.int8:
            return self._error
        stack, rows, columns = self.shape
        return unpack(self._error, 8)[0, : stack * rows * columns].view(self.shape)

    @error.setter
    def error(self, value: Tensor) -> None:
        if self.kept.error_dtype == torch.int8:
            flat = value.to(self.device, torch.float32).flatten()
            self._error = pack(pad(flat, (0, room(flat.numel()) - flat.numel())).unsqueeze(0), 8)
        elif hasattr(self, "_error"):
            self._error.copy_(value)
        else:
            self._error = value.to(self.device, self.kept.error_dtype, copy=True)

    @property
    def whole(self) -> bool:
        """Whether the approximation is exact."""
        return self.rank == min(self.shape[1:])

    def nbytes(self) -> int:
        """Of the error and the directions."""
        left = self.left if self.paid is None else self.paid[0]
        return sum(t.nbytes for t in (self._error, self.right, left, *self._spares.values()) if t is not None)

    def rescale(self, scale: float) -> None:
        """Follows the loss's scale."""
        if scale != self.scale:
            self.error = self.error * (scale / self.scale)
            self.scale = scale

    def basis(self, step: int, *, columns: bool) -> Tensor:
        """Orthonormal directions that the next product is with; nothing is changed."""
        known = self.left if columns and self.left is not None else self.right
        drawn = not self.kept.warm_start or (self.kept.refresh is not None and step % self.kept.refresh == 0)
        if drawn:
            known = self._drawn(step, known.shape[1])
        # of zeros QR makes the same unit vectors again and again, which may never meet the gradient
        dead = torch.linalg.vector_norm(to_unit(known), dim=1, keepdim=True) < 1e-20
        basis: Tensor = torch.linalg.qr(torch.where(dead, self._spare(known.shape[1]), known)).Q
        return basis

    def follow(self, left: Tensor, right: Tensor) -> None:
        """The directions of the next step: the factors that were paid out."""
        self.paid = left.contiguous(), right.contiguous()
        self.right = self.paid[1]
        if self.left is not None:
            self.left = self.paid[0]

    def _spare(self, size: int) -> Tensor:
        """Drawn once."""
        if size not in self._spares:
            self._spares[size] = self._drawn(-1, size)
        return self._spares[size]

    def _drawn(self, step: int, size: int) -> Tensor:
        """Random directions of this step and gradient, the same everywhere; the global generator is left alone."""
        generator = torch.Generator().manual_seed(self.key + 1_000_003 * step)
        return torch.randn(self.shape[0], size, self.rank, generator=generator).to(self.device)
