"""What is remembered of a gradient from step to step: the directions it lay in, and what was not sent of it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

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


def times(matrix: Tensor, thin: Tensor) -> Tensor:
    """``matrix @ thin``: BLAS takes the transposed product 2 to 10 times as fast where ``thin`` has few columns."""
    return torch.bmm(thin.mT.contiguous(), matrix.mT).mT


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
        self.shape, self.rank, self.name = shape, min(rank, *shape[1:]), name
        self.kept = Kept() if kept is None else kept
        self.scale = 1.0
        self.error = torch.zeros(shape, dtype=self.kept.error_dtype, device=device)
        self.right = self._drawn(0, shape[2])
        self.left = self._drawn(0, shape[1]) if self.kept.alternate else None
        self._sum: Tensor | None = None

    def rescale(self, scale: float) -> None:
        """Follows the loss's scale."""
        if scale != self.scale:
            self.error.mul_(scale / self.scale)
            self.scale = scale

    def basis(self, step: int, *, columns: bool) -> Tensor:
        """Orthonormal directions that the next product is with; nothing is changed."""
        known = self.left if columns and self.left is not None else self.right
        drawn = not self.kept.warm_start or (self.kept.refresh is not None and step % self.kept.refresh == 0)
        if drawn:
            known = self._drawn(step, known.shape[1])
        # of zeros QR makes the same unit vectors again and again, which may never meet the gradient
        dead = torch.linalg.vector_norm(known, dim=1, keepdim=True) < 1e-20
        basis: Tensor = torch.linalg.qr(torch.where(dead, self._drawn(step, known.shape[1]), known)).Q
        return basis

    def take_in(self, gradient: Tensor) -> None:
        """Adds the gradient to the error."""
        if self.error.dtype == torch.float32:
            self.error.add_(gradient)
        else:  # rounded once, when the step is done
            self._sum = self.error.float().add_(gradient)

    def give_back(self, gradient: Tensor) -> None:
        """Undoes :meth:`take_in`."""
        if self._sum is None:
            self.error.sub_(gradient)
        self._sum = None

    def remains(self, gradient: Tensor) -> None:
        """Nothing is paid out: the gradient becomes zero, the error what was taken in."""
        if self._sum is not None:
            self.error.copy_(self._sum)
        self._sum = None
        gradient.zero_()

    def sum_times(self, left: Tensor) -> Tensor:
        """``(error + gradient)^T left``, of what was taken in."""
        return times((self.error if self._sum is None else self._sum).mT, left)

    def pay_out(self, gradient: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
        """The gradient becomes ``left right^T``, the error what is missing from it (nothing, unless kept)."""
        self.right = right.contiguous()
        if self.left is not None:
            self.left = left.contiguous()
        if not keep:
            self.error.zero_()
        elif self._sum is None:
            torch.baddbmm(self.error, left, right.mT, alpha=-1, out=self.error)
        else:
            self.error.copy_(torch.baddbmm(self._sum, left, right.mT, alpha=-1))
        self._sum = None
        if gradient.dtype == torch.float32 and gradient.is_contiguous():
            torch.bmm(left, right.mT, out=gradient)
        else:
            gradient.copy_(left @ right.mT)

    def _drawn(self, step: int, size: int) -> Tensor:
        """Random directions of this step and gradient, the same everywhere; the global generator is left alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 1_000_003 * step)
        return torch.randn(self.shape[0], size, self.rank, generator=generator).to(self.error.device)
