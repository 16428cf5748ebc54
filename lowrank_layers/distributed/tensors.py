"""What is remembered of a gradient from step to step: the directions it lay in, and what was not sent of it."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

ERROR_DTYPES = (torch.float32, torch.bfloat16)


def matrix_shape(shape: torch.Size) -> tuple[int, int, int] | None:
    """``(stack, rows, columns)`` of a gradient: convolutions by output channel, stacks of experts one by one.

    ``None`` for scalars and vectors. Three dimensions are a stack where the last one is too long for a kernel.
    """
    if len(shape) < 2:
        return None
    if len(shape) == 3 and shape[2] >= 32:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], shape[1:].numel()


class Memory:
    """The directions and the error of one gradient, a stack of matrices.

    Args:
        shape: ``(stack, rows, columns)``.
        rank: of its approximation.
        name: seeds the first directions, so that they are the same in every process.
        device: of the gradient.
        error_dtype: what was not sent is remembered in.
        warm_start: whether directions go on from the last step's.
        refresh: steps after which they are drawn anew.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        rank: int,
        name: str,
        device: torch.device,
        *,
        error_dtype: torch.dtype = torch.float32,
        warm_start: bool = True,
        refresh: int | None = None,
    ) -> None:
        self.shape, self.rank, self.name = shape, min(rank, *shape[1:]), name
        self.warm_start, self.refresh = warm_start, refresh
        self.scale = 1.0
        self.error = torch.zeros(shape, dtype=error_dtype, device=device)
        self.right = self._drawn(0, shape[2])
        self.left = self._drawn(0, shape[1])

    def rescale(self, scale: float) -> None:
        """Follows the loss's scale."""
        if scale != self.scale:
            self.error.mul_(scale / self.scale)
            self.scale = scale

    def prepare(self, step: int, *, columns: bool) -> None:
        """Makes the directions orthonormal that the next product is with."""
        name = "left" if columns else "right"
        known: Tensor = getattr(self, name)
        if not self.warm_start or (self.refresh is not None and step % self.refresh == 0):
            known = self._drawn(step, known.shape[1])
        # of zeros QR makes the same unit vectors again and again, which may never meet the gradient
        dead = torch.linalg.vector_norm(known, dim=1, keepdim=True) < 1e-20
        setattr(self, name, torch.linalg.qr(torch.where(dead, self._drawn(step, known.shape[1]), known)).Q)

    def left_of(self, gradient: Tensor) -> Tensor:
        """``(gradient + error) right``; neither is changed, so that the step can still be given up."""
        return gradient.float() @ self.right + self.error.float() @ self.right

    def right_of(self, gradient: Tensor) -> Tensor:
        """``(gradient + error)^T left``, likewise."""
        return gradient.float().mT @ self.left + self.error.float().mT @ self.left

    def take_in(self, gradient: Tensor) -> None:
        """The error becomes ``gradient + error``."""
        self.error.add_(gradient)

    def error_times(self, left: Tensor) -> Tensor:
        """``error^T left``."""
        return self.error.float().mT @ left

    def pay_out(self, gradient: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
        """The gradient becomes ``left right^T``, the error what is missing from it (nothing, unless kept)."""
        self.left, self.right = left, right
        if not keep:
            self.error.zero_()
        elif self.error.dtype == torch.float32:
            torch.baddbmm(self.error, left, right.mT, alpha=-1, out=self.error)
        else:
            self.error.copy_(torch.baddbmm(self.error.float(), left, right.mT, alpha=-1))
        if gradient.dtype == torch.float32 and gradient.is_contiguous():
            torch.bmm(left, right.mT, out=gradient)
        else:
            gradient.copy_(left @ right.mT)

    def _drawn(self, step: int, size: int) -> Tensor:
        """Random directions of this step and gradient, the same everywhere; the global generator is left alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 1_000_003 * step)
        return torch.randn(self.shape[0], size, self.rank, generator=generator).to(self.error.device)
