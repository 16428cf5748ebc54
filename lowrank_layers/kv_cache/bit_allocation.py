"""Bits by direction: reverse water-filling over all directions of all layers, keys, values and groups of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .quantizers import DISTORTIONS, SCARCE, STEPS, WIDTHS, Directions, Widths
from .whole_bytes import in_whole_bytes


def allocate_bits(groups: Sequence[Directions], limit: float) -> list[Widths]:
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
    scarce = limit < SCARCE * sum(group.bit * len(group.variances) for group in groups)
    allowed = [bits for bits in WIDTHS if bits != 3 or scarce]
    for index, group in enumerate(groups):
        for bits, step, saved in _hull(group, allowed):
            savings.append(group.variances.double().cpu() * saved / step)
            costs.append(torch.full((len(group.variances),), step, dtype=torch.double))
            owners.append(torch.full((len(group.variances),), index * 16 + bits))
    saving, cost, owner = torch.cat(savings), torch.cat(costs), torch.cat(owners)
    order = saving.argsort(descending=True, stable=True)
    taken = owner[order][cost[order].cumsum(0) <= limit]
    # those with at least so many bits
    least = {key: int((taken == key).sum()) for key in set(taken.tolist())}
    wanted = [[_at_least(least, index, bits) for bits in WIDTHS] for index in range(len(groups))]
    return in_whole_bytes(groups, wanted, limit, threes=scarce)


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


def _hull(group: Directions, allowed: Sequence[int]) -> list[tuple[int, float, float]]:
    """Steps between widths that save less and less per cost: bits after the step, its cost, what it saves."""
    points = [(0, 0.0, 1.0)] + [(bits, group.first + bits * group.bit, DISTORTIONS[bits]) for bits in reversed(allowed)]
    found, at = [], 0
    while at < len(points) - 1:
        slopes = [(points[at][2] - p[2]) / (p[1] - points[at][1]) for p in points[at + 1 :]]
        best = at + 1 + max(range(len(slopes)), key=slopes.__getitem__)
        found.append((points[best][0], points[best][1] - points[at][1], points[at][2] - points[best][2]))
        at = best
    return found


def _at_least(least: dict[int, int], index: int, bits: int) -> int:
    return max((count for key, count in least.items() if key // 16 == index and key % 16 >= bits), default=0)
