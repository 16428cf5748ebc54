"""Several tensors averaged over processes in one exchange, in the dtype of the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .collectives import Mean
from .microscaling import BLOCK, pack, room, unpack

WIRE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def bytes_on_wire(count: int, wire: torch.dtype | None, *, factor: bool = True) -> int:
    """Of so many numbers of one tensor."""
    if wire != torch.int8:
        return count * (4 if wire is None else wire.itemsize)
    return room(count) // BLOCK * (BLOCK * (1 if factor else 2) + 1)


class Parcel:
    """Averages ``factors`` and ``whole`` tensors in place, unless what comes is not finite.

    Args:
        factors: ``[stack, rank, size]`` in fp32; what they lose on the wire is remembered as an error.
        whole: what nothing is remembered of.
        mean: over the processes.
        wire: ``None`` is fp32. What overflows a narrow one goes out again in fp32. ``int8`` sends factors in 8 bits and
            the rest in 16, see :mod:`.microscaling`.
        keys: one a factor, its own in every bucket: says where it is added up.

    Attributes:
        sent: bytes.
        finite: whether everything that came is; if not, nothing has changed.
        shares: what this process has put into the mean of each factor: the mean over processes is the result, but for
            what a backend rounds where it adds fp16 or bf16.
    """

    def __init__(
        self,
        factors: Sequence[Tensor],
        whole: Sequence[Tensor],
        mean: Mean,
        wire: torch.dtype | None,
        keys: Sequence[int] = (),
    ) -> None:
        self.sent, self.finite, self.keys = 0, True, keys or range(len(factors))
        self.shares: list[Tensor] = []
        tensors = [*factors, *whole]
        if not tensors:
            return
        if wire == torch.int8:
            result, shares = self._microscaled(factors, whole, mean)
        else:
            result, shares = self._reduced(factors, whole, mean, wire)
        if not self.finite:
            if wire in (torch.float16, torch.bfloat16):
                again = Parcel(factors, whole, mean, None)
                self.sent, self.finite, self.shares = self.sent + again.sent, again.finite, again.shares
            return
        self.shares = shares
        for tensor, part in zip(tensors, result, strict=True):
            tensor.copy_(part)

    def _reduced(
        self, factors: Sequence[Tensor], whole: Sequence[Tensor], mean: Mean, wire: torch.dtype | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        flat = torch.cat([tensor.flatten().to(wire or torch.float32) for tensor in (*factors, *whole)])
        own = flat[: sum(factor.numel() for factor in factors)].to(torch.float32, copy=True)
        mean.over_(flat)
        self.sent += flat.nbytes
        self.finite = bool(torch.isfinite(flat).all())
        return _like(flat, [*factors, *whole]), _like(own, factors)

    def _microscaled(
        self, factors: Sequence[Tensor], whole: Sequence[Tensor], mean: Mean
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each process adds up some blocks of everything and tells the others, rounded both times.

        Who rounds a sum owes the difference: it belongs to that process' share.
        """
        device = (*factors, *whole)[0].device
        shapes = [
            Blocks(factors, self.keys, mean.size, device),
            Blocks(whole, range(len(whole)), mean.size, device),
        ]
        parts = [(shapes[0].dealt(factors), 8), (shapes[1].dealt(whole), 16)]
        packed, widths = _packed(parts)
        received = mean.exchanged(packed)
        sums = [(rows.mean(0, keepdim=True), bits) for rows, bits in _unpacked(received, widths)]
        mine, _ = _packed(sums)
        results = [rows for rows, _ in _unpacked(mean.gathered(mine), widths)]
        self.sent += packed.nbytes
        self.finite = all(bool(torch.isfinite(rows).all()) for rows in results)
        own = _unpacked(packed, widths)[0][0]
        place = mean.group.rank()
        own[place] += mean.size * (results[0][place] - sums[0][0][0])
        back = [part for blocks, rows in zip(shapes, results, strict=True) for part in blocks.gathered(rows)]
        return back, shapes[0].gathered(own)


class Blocks:
    """Deals the blocks of tensors out to processes, the same for a tensor whatever else is there.

    Buckets that are rebuilt after a restart hold other tensors together, and what a process owes must not depend on it.

    Args:
        tensors: at least of these shapes; no two share a block.
        keys: which process a tensor's first block goes to, modulo their number; the others follow in turn.
        processes: their number.
        device: of the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor], keys: Sequence[int], processes: int, device: torch.device) -> None:
        self.shapes = [tensor.shape for tensor in tensors]
        self.rooms = [room(tensor.numel()) for tensor in tensors]
        firsts = [(key + torch.arange(size // BLOCK)) % processes for key, size in zip(keys, self.rooms, strict=True)]
        owner = torch.cat([torch.zeros(0, dtype=torch.long), *firsts])
        each = [(owner == process).nonzero().flatten() for process in range(processes)]
        # a block of zeros stands behind the others, for who has fewer
        most = max(map(len, each))
        order = [pad(blocks, (0, most - len(blocks)), value=len(owner)) for blocks in each]
        self.order, self.device = torch.stack(order).to(device), device

    def dealt(self, tensors: Sequence[Tensor]) -> Tensor:
        """``[processes, ...]``."""
        flats = [pad(t.flatten().float(), (0, size - t.numel())) for t, size in zip(tensors, self.rooms, strict=True)]
        blocks = torch.cat([*flats, torch.zeros(BLOCK, device=self.device)]).view(-1, BLOCK)
        return blocks[self.order].flatten(1)

    def gathered(self, rows: Tensor) -> list[Tensor]:
        """The tensors again."""
        blocks = rows.new_empty(sum(self.rooms) // BLOCK + 1, BLOCK)
        blocks[self.order] = rows.view(*self.order.shape, BLOCK)
        parts = blocks.flatten()[: sum(self.rooms)].split(self.rooms)
        return [part[: shape.numel()].view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _packed(parts: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, list[tuple[int, int]]]:
    packed = [pack(rows, bits) for rows, bits in parts]
    return torch.cat(packed, 1), [(part.shape[1], bits) for part, (_, bits) in zip(packed, parts, strict=True)]


def _unpacked(packed: Tensor, widths: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
    parts = packed.split([width for width, _ in widths], 1)
    return [(unpack(part, bits), bits) for part, (_, bits) in zip(parts, widths, strict=True)]
