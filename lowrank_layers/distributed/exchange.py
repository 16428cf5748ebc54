"""Several tensors averaged over processes in one exchange, in the dtype of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .collectives import Collectives
from .microscaling import BLOCK, pack, padded, unpack


def bytes_on_wire(count: int, wire: torch.dtype | None, *, factor: bool = True) -> int:
    """Bytes in which a tensor of ``count`` numbers is sent.

    Args:
        count: number of elements.
        wire: dtype on the wire; ``None`` is fp32.
        factor: whether the tensor is a factor, which ``torch.int8`` sends with 8 bits rather than 16.
    """
    if wire != torch.int8:
        return count * (4 if wire is None else wire.itemsize)
    return padded(count) // BLOCK * (BLOCK * (1 if factor else 2) + 1)


@dataclass(frozen=True)
class Averaged:
    """The outcome of one exchange.

    Args:
        sent: bytes sent by this process.
        finite: whether all means are finite.
        means: the means of the factors, then of the other tensors.
        contributions: this process's contribution to the mean of each factor. Their mean over processes is that mean,
            up to the rounding of a backend that sums in fp16 or bf16.
    """

    sent: int
    finite: bool
    means: list[Tensor]
    contributions: list[Tensor]


class Exchange:
    """Averages factors together with tensors that are not compressed.

    Args:
        collectives: the processes.
        wire: dtype on the wire; ``None`` is fp32.
    """

    def __init__(self, collectives: Collectives, wire: torch.dtype | None) -> None:
        self.collectives = collectives
        self.wire = torch.float32 if wire is None else wire

    def average_(self, factors: Sequence[Tensor], whole: Sequence[Tensor], keys: Sequence[int]) -> Averaged:
        """Averages all tensors in place; where a mean is not finite, they are left as they were.

        Args:
            factors: ``[stack, rank, size]`` in fp32, whose rounding is remembered as an error.
            whole: tensors that nothing is remembered of, sent with 16 bits where factors have 8.
            keys: a number per factor, the same in every process and bucket; it decides which process sums which part.
        """
        if not factors and not whole:
            return Averaged(0, True, [], [])
        if self.wire == torch.int8:
            averaged = self._quantized(factors, whole, keys)
        else:
            averaged = self._all_reduced(factors, whole, self.wire)
        if not averaged.finite and self.wire in (torch.float16, torch.bfloat16):  # perhaps only an overflow
            again = self._all_reduced(factors, whole, torch.float32)
            averaged = replace(again, sent=averaged.sent + again.sent)
        if averaged.finite:
            for tensor, mean in zip((*factors, *whole), averaged.means, strict=True):
                tensor.copy_(mean)
        return averaged

    def _all_reduced(self, factors: Sequence[Tensor], whole: Sequence[Tensor], wire: torch.dtype) -> Averaged:
        flat = torch.cat([tensor.flatten().to(wire) for tensor in (*factors, *whole)])
        own = flat[: sum(factor.numel() for factor in factors)].to(torch.float32, copy=True)
        self.collectives.mean_(flat)
        finite = bool(torch.isfinite(flat).all())
        return Averaged(flat.nbytes, finite, _split_like(flat, (*factors, *whole)), _split_like(own, factors))

    def _quantized(self, factors: Sequence[Tensor], whole: Sequence[Tensor], keys: Sequence[int]) -> Averaged:
        """Each process sums some blocks of all tensors and sends the sums to the others, rounded both times.

        The process that rounds a sum counts the difference as a part of its contribution.
        """
        device, size = (*factors, *whole)[0].device, self.collectives.size
        layouts = [_BlockLayout(factors, keys, size, device), _BlockLayout(whole, range(len(whole)), size, device)]
        rows = [layout.scatter(tensors) for layout, tensors in zip(layouts, (factors, whole), strict=True)]
        packed, widths = _pack_all(rows)
        received = _unpack_all(self.collectives.all_to_all(packed), widths)
        sums = [part.mean(0, keepdim=True) for part in received]
        means = _unpack_all(self.collectives.all_gather(_pack_all(sums)[0]), widths)
        own = _unpack_all(packed, widths)[0]
        process = self.collectives.group.rank()
        own[process] += size * (means[0][process] - sums[0][0])
        return Averaged(
            packed.nbytes,
            all(bool(torch.isfinite(part).all()) for part in means),
            [tensor for layout, part in zip(layouts, means, strict=True) for tensor in layout.gather(part)],
            layouts[0].gather(own),
        )


class _BlockLayout:
    """Which process sums which blocks of some tensors; for each tensor the same, whatever stands beside it.

    Buckets that are rebuilt after a restart hold other tensors together, and the errors must not depend on that.

    Args:
        tensors: tensors of the shapes to lay out; no two share a block.
        keys: the process of a tensor's first block, modulo their number; the next blocks follow in turn.
        processes: number of processes.
        device: device of the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor], keys: Sequence[int], processes: int, device: torch.device) -> None:
        self.shapes = [tensor.shape for tensor in tensors]
        self.sizes = [padded(tensor.numel()) for tensor in tensors]
        firsts = [(key + torch.arange(size // BLOCK)) % processes for key, size in zip(keys, self.sizes, strict=True)]
        owner = torch.cat([torch.zeros(0, dtype=torch.long), *firsts])
        each = [(owner == process).nonzero().flatten() for process in range(processes)]
        # processes with fewer blocks get the block of zeros behind the others
        most = max(map(len, each))
        order = [pad(blocks, (0, most - len(blocks)), value=len(owner)) for blocks in each]
        self.order, self.device = torch.stack(order).to(device), device

    def scatter(self, tensors: Sequence[Tensor]) -> Tensor:
        """The blocks of the tensors as ``[processes, ...]``, a row per process."""
        flats = [pad(t.flatten().float(), (0, size - t.numel())) for t, size in zip(tensors, self.sizes, strict=True)]
        blocks = torch.cat([*flats, torch.zeros(BLOCK, device=self.device)]).view(-1, BLOCK)
        return blocks[self.order].flatten(1)

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Inverse of :meth:`scatter`."""
        blocks = rows.new_empty(sum(self.sizes) // BLOCK + 1, BLOCK)
        blocks[self.order] = rows.view(*self.order.shape, BLOCK)
        parts = blocks.flatten()[: sum(self.sizes)].split(self.sizes)
        return [part[: shape.numel()].view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _split_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


_BITS = (8, 16)
"""Bits per number of factors, and of tensors that are not compressed."""


def _pack_all(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """The bytes of both parts side by side, and the width of each."""
    packed = [pack(part, bits) for part, bits in zip(rows, _BITS, strict=True)]
    return torch.cat(packed, 1), [part.shape[1] for part in packed]


def _unpack_all(packed: Tensor, widths: Sequence[int]) -> list[Tensor]:
    return [unpack(part, bits) for part, bits in zip(packed.split(list(widths), 1), _BITS, strict=True)]
