"""One bucket of gradients, averaged over processes at low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import to_unit
from .collectives import Mean
from .error_feedback import Memory
from .exchange import Parcel
from .matrices import gradient_of, matrices_of, times


@dataclass(eq=False)
class Piece:
    """A gradient and what is remembered of it; without a memory it is sent whole."""

    gradient: Tensor
    memory: Memory | None


@dataclass(frozen=True)
class How:
    """What the steps of one bucket have in common."""

    step: int
    alternate: bool
    error_feedback: bool
    local_iterations: int
    wire: torch.dtype | None


class Low:
    """A gradient with the error of before, and its product with a basis: what is sent next.

    Args:
        gradient: of any shape; where it is fp32, the sum stands in its place until the step is over.
        memory: of it.
        how: of this step.
    """

    def __init__(self, gradient: Tensor, memory: Memory, how: How) -> None:
        rows, columns = memory.shape[1:]
        # at full rank the product with the shorter side's basis loses nothing
        in_turn = how.step % 2 == 1 if not memory.whole else rows <= columns
        self.columns = how.alternate and in_turn
        self.gradient, self.memory, self.how = gradient, memory, how
        with memory.clock.running():
            matrix = matrices_of(gradient)
            if matrix.data_ptr() % 64:
                # BLAS rounds otherwise there, and buckets that are rebuilt after a restart move gradients about
                matrix = matrix.clone()
            self.alive = ((matrix.amax() != 0) | (matrix.amin() != 0)).float().reshape(1)
            self.inside = matrix.dtype == torch.float32 and matrix.data_ptr() == gradient.data_ptr()
            self.sum = matrix.float()
            if how.error_feedback:
                self.sum.add_(memory.error)
            self.basis = memory.basis(how.step, columns=self.columns)
            self.factor = times(self.sum.mT, self.basis) if self.columns else times(self.sum, self._improved())

    def turn(self) -> None:
        """From the averaged product of the rows to the one of the columns."""
        with self.memory.clock.running():
            self.basis = torch.linalg.qr(self.factor).Q
            self.factor, self.columns = times(self.sum.mT, self.basis), True

    def forget(self) -> None:
        """Leaves the gradient as it came, to rounding."""
        if self.inside and self.how.error_feedback:
            self.sum.sub_(self.memory.error)

    def postpone(self) -> None:
        """Nothing is paid out: the gradient becomes zero, and is owed."""
        if self.how.error_feedback:
            self.memory.error = self.sum
        self.gradient.zero_()

    def pay_out(self, share: Tensor) -> None:
        """The gradient becomes the product of basis and factor; what this process' share of it lacks is owed.

        Args:
            share: of this process in the factor that was averaged: the mean of all is that factor.
        """
        with self.memory.clock.running():
            left, right = self._pair(self.factor)
            self.memory.follow(left, right)
            if self.how.error_feedback:
                own_left, own_right = self._pair(share)
                self.memory.error = self.sum.baddbmm_(own_left, own_right.mT, alpha=-1)
            if self.inside:
                torch.bmm(left, right.mT, out=self.sum)
            else:
                self.gradient.copy_(gradient_of(left @ right.mT, self.gradient.shape))

    def _pair(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        return (self.basis, factor) if self.columns else (factor, self.basis)

    def _improved(self) -> Tensor:
        """The basis after steps of subspace iteration on this process' own sum, turned as the basis is.

        What is sent is then only the start of a basis, and any process may start from its own.
        """
        basis = self.basis
        if self.how.alternate or self.memory.whole:
            return basis
        for _ in range(self.how.local_iterations):
            basis, triangle = torch.linalg.qr(times(self.sum.mT, to_unit(times(self.sum, basis))))
            basis = basis * torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
        return basis


def reduce_(buffer: Tensor, pieces: Sequence[Piece], mean: Mean, how: How) -> int:
    """Averages all gradients in place; returns the bytes that were sent.

    Gradients that are not finite in any process make the first exchange so everywhere: then nothing is remembered, and
    they are averaged as they are. A gradient that is zero in every process stays so, and its error is kept: DDP would
    throw away what an unused parameter were paid.
    """
    lows = [Low(piece.gradient, piece.memory, how) for piece in pieces if piece.memory is not None]
    whole = [piece.gradient for piece in pieces if piece.memory is None]
    if not lows and buffer.dtype == torch.float32 and how.wire in (None, torch.float32):
        mean.over_(buffer)
        return buffer.nbytes
    # vectors go as they would beside factors: after a restart they may share a bucket with some
    alive = torch.cat([torch.zeros(0, device=buffer.device), *(low.alive for low in lows)])
    parcel = _exchanged(lows, [alive, *whole], mean, how)
    sent = parcel.sent
    if not parcel.finite:
        for low in lows:
            low.forget()
        mean.over_(buffer)
        return sent + buffer.nbytes
    lives, shares = alive.tolist(), parcel.shares
    for low in (low for low, any_where in zip(lows, lives, strict=True) if not any_where):
        low.postpone()
    shares = [share for share, any_where in zip(shares, lives, strict=True) if any_where]
    lows = [low for low, any_where in zip(lows, lives, strict=True) if any_where]
    if not how.alternate:
        for low in lows:
            low.turn()
        parcel = _exchanged(lows, [], mean, how)
        sent, shares = sent + parcel.sent, parcel.shares
        if not parcel.finite:
            for low in lows:
                low.gradient.fill_(torch.nan)
            return sent
    for low, share in zip(lows, shares, strict=True):
        low.pay_out(share.mT)
    return sent


def _exchanged(lows: Sequence[Low], whole: Sequence[Tensor], mean: Mean, how: How) -> Parcel:
    factors, keys = [low.factor.mT for low in lows], [low.memory.key for low in lows]
    return Parcel(factors, whole, mean, how.wire, keys)
