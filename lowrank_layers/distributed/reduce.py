"""One bucket of gradients, averaged over processes at low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import Mean
from .tensors import Memory, times


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
    wire: torch.dtype | None


class Low:
    """A gradient, its memory, and the products that are sent of both.

    Args:
        gradient: of any shape.
        memory: of it.
        how: of this step.
    """

    def __init__(self, gradient: Tensor, memory: Memory, how: How) -> None:
        rows, columns = memory.shape[1:]
        # at full rank the product with the shorter side's basis loses nothing
        in_turn = how.step % 2 == 1 if memory.rank < min(rows, columns) else rows <= columns
        self.columns = how.alternate and in_turn
        self.gradient, self.memory = gradient, memory
        self.matrix = gradient.reshape(memory.shape)
        if self.matrix.data_ptr() % 64:
            # BLAS rounds otherwise there, and buckets that are rebuilt after a restart move gradients about
            self.matrix = self.matrix.clone()
        self.basis = memory.basis(how.step, columns=self.columns)
        matrix, error = self.matrix.float(), memory.error.float()
        fresh = times(matrix.mT, self.basis) if self.columns else times(matrix, self.basis)
        self.alive = fresh.any().float().reshape(1)
        self.factor = fresh.add_(times(error.mT, self.basis) if self.columns else times(error, self.basis))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Where one product is the whole step."""
        return (self.basis, self.factor) if self.columns else (self.factor, self.basis)

    def write(self) -> None:
        """Copies the matrix back where it is not a view of the gradient."""
        if self.matrix.data_ptr() != self.gradient.data_ptr():
            self.gradient.copy_(self.matrix.reshape(self.gradient.shape))


def reduce_(buffer: Tensor, pieces: Sequence[Piece], mean: Mean, how: How) -> int:
    """Averages all gradients in place; returns the bytes that were sent.

    Gradients that are not finite in any process make the first collective so everywhere: then nothing is remembered,
    and they are averaged as they are. A gradient that is zero in every process stays so, and its error is kept: DDP
    would throw away what an unused parameter were paid.
    """
    lows = [Low(piece.gradient, piece.memory, how) for piece in pieces if piece.memory is not None]
    whole = [piece.gradient for piece in pieces if piece.memory is None]
    if not lows:
        mean.over_(buffer)
        return buffer.nbytes
    sent, finite = _mean_of([t for low in lows for t in (low.factor, low.alive)] + whole, mean, how.wire)
    if not finite:
        mean.over_(buffer)
        return sent + buffer.nbytes
    alive = torch.cat([low.alive for low in lows]).tolist()
    for low in lows:
        low.memory.take_in(low.matrix)
    for low, lives in zip(lows, alive, strict=True):
        if not lives:
            low.memory.remains(low.matrix)
            low.write()
    lows = [low for low, lives in zip(lows, alive, strict=True) if lives]
    if how.alternate:
        pairs = [low.factors() for low in lows]
    else:
        lefts = [torch.linalg.qr(low.factor).Q for low in lows]
        rights = [low.memory.sum_times(left) for low, left in zip(lows, lefts, strict=True)]
        more, finite = _mean_of(rights, mean, how.wire)
        sent += more
        if not finite:
            for low in lows:
                low.memory.give_back(low.matrix)
                low.gradient.fill_(torch.nan)
            return sent
        pairs = list(zip(lefts, rights, strict=True))
    for low, (left, right) in zip(lows, pairs, strict=True):
        low.memory.pay_out(low.matrix, left, right, keep=how.error_feedback)
        low.write()
    return sent


def _mean_of(tensors: Sequence[Tensor], mean: Mean, wire: torch.dtype | None) -> tuple[int, bool]:
    """Averages all in place in one collective; its bytes, and whether all is finite (they change only then).

    What overflows a narrow ``wire`` goes out again without it.
    """
    if not tensors:
        return 0, True
    flat = torch.cat([tensor.flatten().to(wire or tensor.dtype) for tensor in tensors])
    mean.over_(flat)
    if not bool(torch.isfinite(flat).all()):
        again, finite = _mean_of(tensors, mean, None) if wire not in (None, torch.float32) else (0, False)
        return flat.nbytes + again, finite
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
    return flat.nbytes, True
