"""One bucket of gradients, averaged over processes at low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import Mean
from .tensors import Memory


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


def reduce_(buffer: Tensor, pieces: Sequence[Piece], mean: Mean, how: How) -> int:
    """Averages all gradients in place; returns the bytes that were sent.

    Gradients that are not finite in any process make the first collective so everywhere: then nothing is remembered,
    and they are averaged as they are.
    """
    low = [piece for piece in pieces if piece.memory is not None]
    whole = [piece.gradient for piece in pieces if piece.memory is None]
    matrices = [piece.gradient.reshape(piece.memory.shape) for piece in low if piece.memory is not None]
    memories = [piece.memory for piece in low if piece.memory is not None]
    columns = how.alternate and how.step % 2 == 1
    for memory in memories:
        memory.prepare(how.step, columns=columns)
    factors = [
        memory.right_of(matrix) if columns else memory.left_of(matrix)
        for memory, matrix in zip(memories, matrices, strict=True)
    ]
    sent, finite = _mean_of(factors, whole, mean, how.wire)
    if not finite:
        mean.over_(buffer)
        return sent + buffer.nbytes
    for memory, matrix in zip(memories, matrices, strict=True):
        memory.take_in(matrix)
    if columns:
        pairs = [(memory.left, factor) for memory, factor in zip(memories, factors, strict=True)]
    elif how.alternate:
        pairs = [(factor, memory.right) for memory, factor in zip(memories, factors, strict=True)]
    else:
        lefts = [torch.linalg.qr(factor).Q for factor in factors]
        rights = [memory.error_times(left) for memory, left in zip(memories, lefts, strict=True)]
        more, _ = _mean_of(rights, [], mean, how.wire)
        sent += more
        pairs = list(zip(lefts, rights, strict=True))
    for piece, memory, matrix, (left, right) in zip(low, memories, matrices, pairs, strict=True):
        memory.pay_out(matrix, left, right, keep=how.error_feedback)
        if matrix.data_ptr() != piece.gradient.data_ptr():
            piece.gradient.copy_(matrix.reshape(piece.gradient.shape))
    return sent


def _mean_of(
    factors: Sequence[Tensor], whole: Sequence[Tensor], mean: Mean, wire: torch.dtype | None
) -> tuple[int, bool]:
    """Averages all in place in one collective; its bytes, and whether all is finite (whole ones change only then)."""
    tensors = [*factors, *whole]
    if not tensors:
        return 0, True
    flat = torch.cat([tensor.flatten().to(wire or tensor.dtype) for tensor in tensors])
    mean.over_(flat)
    if not bool(torch.isfinite(flat).all()):
        return flat.nbytes, False
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
    return flat.nbytes, True
