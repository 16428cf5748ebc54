"""Several tensors averaged over processes in one exchange, in the dtype of the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .collectives import Mean
from .microscaling import BLOCK, pack, room, unpack

WIRE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class Parcel:
    """Averages ``factors`` and ``whole`` tensors in place, unless what comes is not finite.

    Args:
        factors: ``[stack, rank, size]`` in fp32; what they lose on the wire is remembered as an error.
        whole: what nothing is remembered of.
        mean: over the processes.
        wire: ``None`` leaves every dtype as it is. What overflows a narrow one goes out again without it. ``int8``
            sends factors in 8 bits and the rest in 16, see :mod:`.microscaling`.

    Attributes:
        sent: bytes.
        finite: whether everything that came is; if not, nothing has changed.
        shares: what this process has put into the mean of each factor: the mean over processes is the result.
    """

    def __init__(
        self, factors: Sequence[Tensor], whole: Sequence[Tensor], mean: Mean, wire: torch.dtype | None
    ) -> None:
        self.sent, self.finite = 0, True
        self.shares: list[Tensor] = []
        tensors = [*factors, *whole]
        if not tensors:
            return
        if wire == torch.int8:
            result, shares = self._microscaled(factors, whole, mean)
        else:
            result, shares = self._reduced(factors, whole, mean, wire)
        if not all(bool(torch.isfinite(part).all()) for part in result):
            self.finite = False
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
        flat = torch.cat([tensor.flatten().to(wire or tensor.dtype) for tensor in (*factors, *whole)])
        own = flat[: sum(factor.numel() for factor in factors)].to(torch.float32, copy=True)
        mean.over_(flat)
        self.sent += flat.nbytes
        return _like(flat, [*factors, *whole]), _like(own, factors)

    def _microscaled(
        self, factors: Sequence[Tensor], whole: Sequence[Tensor], mean: Mean
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each process adds up one part of everything and tells the others, rounded both times.

        Who rounds a sum owes the difference: it belongs to that process' share.
        """
        parts = [(_blocks(tensors, mean.size), bits) for tensors, bits in ((factors, 8), (whole, 16)) if tensors]
        packed, widths = _packed(parts)
        received = mean.exchanged(packed)
        sums = [(rows.mean(0, keepdim=True), bits) for rows, bits in _unpacked(received, widths)]
        mine, _ = _packed(sums)
        results = [rows for rows, _ in _unpacked(mean.gathered(mine), widths)]
        self.sent += packed.nbytes
        place = mean.group.rank()
        shares: list[Tensor] = []
        if factors:
            own = _unpacked(packed, widths)[0][0]
            own[place] += mean.size * (results[0][place] - sums[0][0][0])
            shares = _from_blocks(own, factors)
        groups = [tensors for tensors in (factors, whole) if tensors]
        return [t for rows, ts in zip(results, groups, strict=True) for t in _from_blocks(rows, ts)], shares


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _blocks(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """``[rows, ...]`` with blocks that no two tensors share."""
    flats = [pad(tensor.flatten().float(), (0, room(tensor.numel()) - tensor.numel())) for tensor in tensors]
    flat = torch.cat(flats)
    return pad(flat, (0, -flat.numel() % (BLOCK * rows))).view(rows, -1)


def _from_blocks(rows: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    flat = rows.flatten()
    parts = flat[: sum(room(t.numel()) for t in tensors)].split([room(t.numel()) for t in tensors])
    return [part[: t.numel()].view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _packed(parts: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, list[tuple[int, int]]]:
    packed = [pack(rows, bits) for rows, bits in parts]
    return torch.cat(packed, 1), [(part.shape[1], bits) for part, (_, bits) in zip(packed, parts, strict=True)]


def _unpacked(packed: Tensor, widths: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
    parts = packed.split([width for width, _ in widths], 1)
    return [(unpack(part, bits), bits) for part, (_, bits) in zip(parts, widths, strict=True)]
