"""Bond ranks of block tensor trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import LowRankError
from ..rank import Spectrum, check_rank, choose_rank
from ..rank.size import ParameterFraction
from .digits import Split

BondRank = int | ParameterFraction | Sequence[int]
Bonds = tuple[int, ...]
"""The ranks between neighbouring cores, one fewer than there are cores."""


def clamp_bonds(bonds: Sequence[int], split: Split) -> Bonds:
    """Limits each bond to the largest that is of use: its neighbour's times the digits between them, from both ends."""
    modes = [n * d for n, d in zip(*split, strict=True)]
    chain = [1, *bonds, 1]
    for k in range(1, len(modes)):
        chain[k] = min(chain[k], chain[k - 1] * modes[k - 1])
    for k in range(len(modes) - 1, 0, -1):
        chain[k] = min(chain[k], chain[k + 1] * modes[k])
    return tuple(chain[1:-1])


def train_size(bonds: Sequence[int], split: Split) -> int:
    """Number of values that a train of these bonds stores."""
    chain = [1, *bonds, 1]
    return sum(chain[k] * n * d * chain[k + 1] for k, (n, d) in enumerate(zip(*split, strict=True)))


def uniform_bonds(split: Split) -> list[Bonds]:
    """The bonds for ``rank=1``, ``rank=2`` and so on, up to the largest that are of use."""
    count = len(split[0]) - 1
    largest = clamp_bonds((math.prod(n * d for n, d in zip(*split, strict=True)),) * count, split)
    return [clamp_bonds((rank,) * count, split) for rank in range(1, max(largest) + 1)]


def choose_bonds(rank: Any, split: Split, dense_size: int, owner: str) -> Bonds:
    """Turns a rank argument into the bonds of a train.

    Args:
        rank: one integer for all bonds, one per bond, or ``ParameterFraction``; integers are clamped.
        split: digits of the matrix.
        dense_size: number of values in the matrix, of which ``ParameterFraction`` takes a part.
        owner: name of the caller, for error messages.

    Raises:
        LowRankError: for a wrong number of bonds, ranks below 1 and rules that look at singular values.
    """
    count = len(split[0]) - 1
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        if len(rank) != count or not all(isinstance(each, int) for each in rank):
            raise LowRankError(
                f"{owner}: got rank {rank!r}, expected one integer, {count} of them (one per bond) or"
                " ParameterFraction."
            )
        for each in rank:
            check_rank(each, owner)
        return clamp_bonds(rank, split)
    check_rank(rank, owner)
    if isinstance(rank, int):
        return clamp_bonds((rank,) * count, split)
    ladder = uniform_bonds(split)
    sizes = [train_size(bonds, split) for bonds in ladder]
    shape = math.prod(split[0]), math.prod(split[1])
    return ladder[choose_rank(rank, Spectrum(None, shape, sizes, dense_size, owner), len(ladder)) - 1]
