"""Bits by direction: the least error under a limit, as a search over all choices finds it."""

from itertools import combinations_with_replacement, product

import pytest
import torch

from lowrank_layers.kv_cache.bit_allocation import (
    DISTORTIONS,
    STEPS,
    WIDTHS,
    Directions,
    allocate_bits,
    distortion,
    steps_of,
)


def cost_of(group, widths):
    bits = sum(width * count for width, count in zip(WIDTHS, widths, strict=True))
    return group.bit * bits + group.first * sum(widths)


def least_error(groups, limit):
    """Of all choices in which directions of greater variance have no fewer bits, and whole bytes are filled."""
    choices = []
    for group in groups:
        found = []
        for bits in combinations_with_replacement((*WIDTHS, 0), len(group.variances)):
            widths = tuple(bits.count(width) for width in WIDTHS)
            if all(width * count % 8 == 0 for width, count in zip(WIDTHS, widths, strict=True)):
                found.append((cost_of(group, widths), distortion(group.variances, widths)))
        choices.append(found)
    return min(sum(d for _, d in chosen) for chosen in product(*choices) if sum(c for c, _ in chosen) <= limit)


@pytest.mark.parametrize("first", [0.0, 3.0])
def test_no_choice_in_whole_bytes_has_a_clearly_smaller_error(first):
    torch.manual_seed(0)
    for _ in range(10):
        groups = [Directions(torch.rand(9).pow(4).sort(descending=True).values * k, first=first) for k in (1.0, 3.0)]
        for limit in (20, 45, 80):
            widths = allocate_bits(groups, limit)
            assert sum(map(cost_of, groups, widths)) <= limit
            found = sum(distortion(group.variances, each) for group, each in zip(groups, widths, strict=True))
            # one more step in one group, at most: what the last direction that did not fit would have saved
            slack = max(float(group.variances[min(sum(each), 8)]) for group, each in zip(groups, widths, strict=True))
            assert found <= least_error(groups, limit) + 4 * slack


def test_bits_follow_the_water_level():
    variances = torch.logspace(0, -6, 64)
    (widths,) = allocate_bits([Directions(variances)], 2 * 64)
    bits = [width for width, count in zip(WIDTHS, widths, strict=True) for _ in range(count)]
    ideal = 0.5 * torch.log2(variances[: len(bits)] / variances[len(bits) - 1]) + 0.5
    assert all(0.5 < b / float(i) <= 4 for b, i in zip(bits, ideal, strict=True))
    assert all(widths[:3])


def test_groups_share_one_level_whatever_their_number():
    variances = torch.rand(32).sort(descending=True).values
    (alone,) = allocate_bits([Directions(variances)], 64)
    found = allocate_bits([Directions(variances)] * 3, 3 * 64)
    # together they may fill bytes that one alone leaves
    assert all(widths[:-1] == alone[:-1] and widths[-1] - alone[-1] in (0, 8) for widths in found)


def test_a_basis_that_costs_more_leaves_fewer_directions():
    variances = torch.logspace(0, -3, 40)
    ranks = [sum(allocate_bits([Directions(variances, first=first)], 120)[0]) for first in (0.0, 2.0, 8.0)]
    assert ranks[0] > ranks[1] > ranks[2] > 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_steps_and_distortions_are_those_of_the_best_uniform_quantizer(bits):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))

    def error(step):
        middle = (2**bits - 1) / 2
        return float((((x / step + middle).round().clamp(0, 2 * middle) - middle) * step - x).square().mean())

    own = error(STEPS[bits])
    assert own == pytest.approx(DISTORTIONS[bits], rel=0.03)
    assert own <= min(error(STEPS[bits] * factor) for factor in (0.85, 0.93, 1.07, 1.15)) * 1.005
    widths = tuple(int(bits == width) for width in WIDTHS)
    torch.testing.assert_close(steps_of(torch.tensor([4.0]), widths), torch.tensor([2 * STEPS[bits]]))
