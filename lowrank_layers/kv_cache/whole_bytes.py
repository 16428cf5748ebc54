"""Bits of directions, rounded so that they fill whole bytes, and what that leaves spent where it saves most.

A direction with 3 bits has 2 of them among those of 2 bits, and the other among those of 1 bit: see ``bit_planes.py``.
So directions of 4 bits come in twos, those of 3 and 2 bits together in fours, and those of 3 and 1 bit in eights.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

from .quantizers import DISTORTIONS, WIDTHS, Directions, Widths

MOVES: tuple[Widths, ...] = (
    *((1, 0, 0, 0, 0), (0, 2, 0, 0, 0), (0, 0, 4, 0, 4), (0, 0, 0, 4, 0), (0, 0, 0, 0, 8)),
    *((0, 2, 0, -4, 8), (0, 2, 0, -4, 0), (0, -2, 0, 4, 0), (0, 0, 4, -4, 4), (0, 0, -4, 4, 4)),
    *((0, 0, 4, 0, -12), (0, 0, -4, 0, 12), (0, 0, 0, 4, -8), (0, 0, 0, -4, 8), (0, 0, 8, -8, -8), (0, 0, -8, 8, 8)),
    *((0, 2, -4, 0, 4), (0, 2, -4, 4, -4), (0, -2, 4, -4, 4), (-1, 2, 0, 0, 0), (1, -2, 0, 0, 0)),
)
"""Changes of the numbers of directions with each of ``WIDTHS`` bits, by whole bytes."""


def in_whole_bytes(
    groups: Sequence[Directions], wanted: Sequence[Sequence[int]], limit: float, *, threes: bool = True
) -> list[Widths]:
    """Numbers of directions that fill whole bytes.

    All numbers are rounded down. Then the change that lowers the sum of all errors most per cost is made, as long as
    one fits.

    Args:
        groups: directions.
        wanted: for every group, how many directions should have at least each of ``WIDTHS`` bits.
        limit: greatest sum of the costs.
        threes: whether directions may have 3 bits.
    """
    found = [rounded_down(at_least, threes=threes) for at_least in wanted]
    sums = [[0.0, *accumulate(group.variances.double().tolist())] for group in groups]
    left = limit - sum(group.cost(widths) for group, widths in zip(groups, found, strict=True))
    moves: list[tuple[float, int, float, Widths, Widths]] = []

    def offer(index: int) -> None:
        group, widths = groups[index], found[index]
        before, spent = _error(sums[index], widths), group.cost(widths)
        for move in MOVES:
            changed = tuple(count + change for count, change in zip(widths, move, strict=True))
            if min(changed) < 0 or sum(changed) >= len(sums[index]) or (changed[2] and not threes):
                continue
            saved, cost = before - _error(sums[index], changed), group.cost(changed) - spent
            if saved > 1e-9 * before:
                heapq.heappush(moves, (-saved / max(cost, 1e-9), index, cost, widths, changed))

    for index in range(len(groups)):
        offer(index)
    while moves:
        _, index, cost, widths, changed = heapq.heappop(moves)
        if widths == found[index] and cost <= left:
            found[index], left = changed, left - cost
            offer(index)
    return found


def rounded_down(at_least: Sequence[int], *, threes: bool = True) -> Widths:
    """Numbers of directions with each of ``WIDTHS`` bits from those with at least so many, none with more.

    Args:
        at_least: for each of ``WIDTHS``, the number of directions with so many bits or more.
        threes: whether directions may have 3 bits.
    """
    eight = at_least[0]
    four = (at_least[1] - eight) // 2 * 2
    of_three, of_two, of_one = (count - eight - four for count in at_least[2:])
    double = of_two // 4 * 4
    three = min(of_three, double) if threes else 0
    single = (of_one - double + three) // 8 * 8
    if single < three:
        three = three // 8 * 8
        single = (of_one - double + three) // 8 * 8
    return eight, four, three, double - three, single - three


def _error(sums: Sequence[float], widths: Widths) -> float:
    """The sum of the mean squared errors, from the sums of the first variances."""
    error, at = 0.0, 0
    for bits, count in zip(WIDTHS, widths, strict=True):
        error += DISTORTIONS[bits] * (sums[at + count] - sums[at])
        at += count
    return error + sums[-1] - sums[at]
