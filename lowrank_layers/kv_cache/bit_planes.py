"""Levels of 8, 4, 3, 2 and 1 bits in planes of bytes, and back.

A level of 3 bits lies in two planes: its last two bits among levels of 2 bits, its first one among those of 1 bit. As
``u - 7/2 = (u mod 4 - 3/2) + 4 (floor(u / 4) - 1/2)``, such a direction is to what reads bytes two directions with the
same column of the basis, the second one four times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .quantizers import WIDTHS

PLANES = (8, 4, 2, 1)
"""Bits that lie together in bytes."""


def threes_of(widths: Sequence[int]) -> int:
    """The number of directions with 3 bits.

    Args:
        widths: numbers of directions with each of ``WIDTHS`` bits.
    """
    return widths[WIDTHS.index(3)]


def packed(levels: Tensor, widths: Sequence[int]) -> dict[str, Tensor]:
    """Levels in bytes: ``8 / width`` directions per byte, those of a whole run of directions in the same bits.

    Args:
        levels: ``[..., rank, tokens]``, uint8.
        widths: numbers of directions with each of ``WIDTHS`` bits.
    """
    found = {}
    eight, four, three, two, one = levels.split(list(widths), -2)
    planes = (eight, four, torch.cat([three & 3, two], -2), torch.cat([three >> 2, one], -2))
    for width, part in zip(PLANES, planes, strict=True):
        pieces = part.unflatten(-2, (8 // width, -1)).unbind(-3) if part.shape[-2] else (part,)
        whole = pieces[0]
        for index, piece in enumerate(pieces[1:], 1):
            whole = whole | (piece << (index * width))
        found[f"levels{width}"] = whole.contiguous()
    return found


def unpacked(codes: Mapping[str, Tensor], widths: Sequence[int]) -> Tensor:
    """The inverse of :func:`packed`.

    Args:
        codes: what it gave.
        widths: numbers of directions with each of ``WIDTHS`` bits.
    """
    planes: dict[int, list[Tensor]] = {}
    for width in PLANES:
        held = codes[f"levels{width}"]
        shifts, last = range(0, 8 - width, width), 8 - width
        planes[width] = [(held >> shift if shift else held) & (2**width - 1) for shift in shifts]
        planes[width].append(held >> last if last else held)
    threes = threes_of(widths)
    if threes:
        low, high = (torch.cat(planes[width], -2) for width in (2, 1))
        three = low[..., :threes, :] | high[..., :threes, :] << 2
        planes[2], planes[1] = [three, low[..., threes:, :]], [high[..., threes:, :]]
    parts = [part for each in planes.values() for part in each if part.shape[-2]]
    return torch.cat(parts, -2) if parts else codes["levels8"]


def plane_counts(widths: Sequence[int]) -> dict[int, int]:
    """Numbers of levels in each of ``PLANES``.

    Args:
        widths: numbers of directions with each of ``WIDTHS`` bits.
    """
    eight, four, three, two, one = widths
    return {8: eight, 4: four, 2: three + two, 1: three + one}


def byte_rows(codes: Mapping[str, Tensor], widths: Sequence[int]) -> list[int]:
    """What compiled functions are told of the planes: the rows of bytes of each, and the directions with 3 bits.

    Args:
        codes: levels in planes.
        widths: numbers of directions with each of ``WIDTHS`` bits.
    """
    return [*(codes[f"levels{width}"].shape[2] for width in PLANES), threes_of(widths)]
