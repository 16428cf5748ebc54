"""Bits by direction: reverse water-filling over all directions of all layers, keys, values and groups of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (8, 4, 2, 1)
"""Bits that a direction can have, other than none, in the order in which directions are stored."""
STEPS = {8: 0.0308, 4: 0.3352, 2: 0.9957, 1: 1.5958}
"""Step of the best uniform quantizer for a Gaussian of variance one, by bits (Max, 1960)."""
DISTORTIONS = {8: 8.77e-5, 4: 0.01154, 2: 0.1188, 1: 0.3634, 0: 1.0}
"""Its mean squared error."""


@dataclass(frozen=True)
class Directions:
    """Directions that compete for bits.

    Args:
        variances: their variances, largest first, ``[directions]``, in units of which all directions save the same.
        bit: cost of one more bit in one direction.
        first: cost of a direction beside its bits, such as a column of a basis.
    """

    variances: Tensor
    bit: float = 1.0
    first: float = 0.0


def allocate_bits(groups: Sequence[Directions], limit: float) -> list[tuple[int, ...]]:
    r"""The bits of every direction, so that the sum of all errors is least under a limit of the cost.

    For a Gaussian the best bits are :math:`\max(0, \tfrac12 \log_2(\sigma_i^2 / \theta))` with one water level
    :math:`\theta` for all. With the errors of real quantizers the same is found by taking the steps that save most
    error per cost, in their order. The directions without bits are those that a lower rank leaves out.

    Args:
        groups: directions; those of one group share their costs.
        limit: greatest sum of the costs.

    Returns:
        For every group, the numbers of directions with each of ``WIDTHS`` bits, which fill whole bytes.
    """
    savings, costs, owners = [], [], []
    for index, group in enumerate(groups):
        for bits, step, saved in _hull(group):
            savings.append(group.variances.double().cpu() * saved / step)
            costs.append(torch.full((len(group.variances),), step, dtype=torch.double))
            owners.append(torch.full((len(group.variances),), index * 16 + bits))
    saving, cost, owner = torch.cat(savings), torch.cat(costs), torch.cat(owners)
    order = saving.argsort(descending=True, stable=True)
    taken = owner[order][cost[order].cumsum(0) <= limit]
    # those with at least so many bits
    least = {key: int((taken == key).sum()) for key in set(taken.tolist())}
    wanted = [[_at_least(least, index, bits) for bits in WIDTHS] for index in range(len(groups))]
    return _fill(groups, wanted, limit)


def distortion(variances: Tensor, widths: Sequence[int]) -> float:
    """The sum of the mean squared errors of all directions.

    Args:
        variances: ``[directions]``, largest first.
        widths: the numbers of directions with each of ``WIDTHS`` bits.
    """
    left = [DISTORTIONS[bits] for bits, count in zip(WIDTHS, widths, strict=True) for _ in range(count)]
    left += [1.0] * (len(variances) - len(left))
    return float(variances.double().cpu() @ torch.tensor(left, dtype=torch.double))


def steps_of(variances: Tensor, widths: Sequence[int]) -> Tensor:
    """The step of the quantizer of every direction that has bits.

    Args:
        variances: ``[..., directions]``, largest first.
        widths: the numbers of directions with each of ``WIDTHS`` bits.
    """
    factors = torch.tensor([STEPS[bits] for bits, count in zip(WIDTHS, widths, strict=True) for _ in range(count)])
    return variances[..., : len(factors)].clamp_min(1e-30).sqrt() * factors.to(variances)


def _hull(group: Directions) -> list[tuple[int, float, float]]:
    """Steps between widths that save less and less per cost: bits after the step, its cost, what it saves."""
    points = [(0, 0.0, 1.0)] + [(bits, group.first + bits * group.bit, DISTORTIONS[bits]) for bits in reversed(WIDTHS)]
    found, at = [], 0
    while at < len(points) - 1:
        slopes = [(points[at][2] - p[2]) / (p[1] - points[at][1]) for p in points[at + 1 :]]
        best = at + 1 + max(range(len(slopes)), key=slopes.__getitem__)
        found.append((points[best][0], points[best][1] - points[at][1], points[at][2] - points[best][2]))
        at = best
    return found


def _at_least(least: dict[int, int], index: int, bits: int) -> int:
    return max((count for key, count in least.items() if key // 16 == index and key % 16 >= bits), default=0)


def _fill(groups: Sequence[Directions], wanted: Sequence[Sequence[int]], limit: float) -> list[tuple[int, ...]]:
    """Whole bytes for all groups: what rounding down leaves goes to those that lack least for another byte."""
    found = [_whole_bytes(at_least) for at_least in wanted]
    spent = (_cost(group, widths) for group, widths in zip(groups, found, strict=True))
    left = limit - sum(spent)
    for index in sorted(range(len(groups)), key=lambda index: sum(found[index]) - wanted[index][-1]):
        group, widths = groups[index], found[index]
        byte = 8 * (group.bit + group.first)
        if sum(widths) < wanted[index][-1] and byte <= left and sum(widths) + 8 <= len(group.variances):
            found[index] = (*widths[:-1], widths[-1] + 8)
            left -= byte
    return found


def _cost(group: Directions, widths: Sequence[int]) -> float:
    bits = sum(width * count for width, count in zip(WIDTHS, widths, strict=True))
    return group.bit * bits + group.first * sum(widths)


def _whole_bytes(at_least: Sequence[int]) -> tuple[int, ...]:
    """Numbers of directions with each of ``WIDTHS`` bits from those with at least so many."""
    found, taken = [], 0
    for bits, count in zip(WIDTHS, at_least, strict=True):
        found.append((count - taken) // (8 // bits) * (8 // bits))
        taken += found[-1]
    return tuple(found)
