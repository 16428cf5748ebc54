"""Bits by direction: the least error under a limit, as a search over all choices finds it."""

from itertools import combinations_with_replacement, product

import pytest
import torch

from lowrank_layers.kv_cache.bit_allocation import DISTORTIONS, STEPS, Directions, allocate_bits, distortion, steps_of


def cost_of(group, widths):
    eight, four, two = widths
    return group.bit * (8 * eight + 4 * four + 2 * two) + group.first * sum(widths)


def least_error(groups, limit):
    """Of all choices in which directions of greater variance have no fewer bits, and whole bytes are filled."""
    choices = []
    for group in groups:
        found = []
        for bits in combinations_with_replacement((8, 4, 2, 0), len(group.variances)):
            widths = tuple(bits.count(width) for width in (8, 4, 2))
            if widths[1] % 2 == 0 and widths[2] % 4 == 0:
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
    ((eight, four, two),) = allocate_bits([Directions(variances)], 2 * 64)
    bits = [8] * eight + [4] * four + [2] * two + [0] * (64 - eight - four - two)
    assert bits == sorted(bits, reverse=True)
    ideal = (0.5 * torch.log2(variances / variances[eight + four + two - 1]) + 1).clamp(max=8)
    assert all(abs(b - float(i)) <= 4 for b, i in zip(bits, ideal, strict=True) if b)
    assert eight * four * two > 0


def test_groups_share_one_level_whatever_their_number():
    variances = torch.rand(32).sort(descending=True).values
    alone = allocate_bits([Directions(variances)], 64)
    assert allocate_bits([Directions(variances)] * 3, 3 * 64) == alone * 3


def test_a_basis_that_costs_more_leaves_fewer_directions():
    variances = torch.logspace(0, -3, 40)
    ranks = [sum(allocate_bits([Directions(variances, first=first)], 120)[0]) for first in (0.0, 2.0, 8.0)]
    assert ranks[0] > ranks[1] > ranks[2] > 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_steps_and_distortions_are_those_of_the_best_uniform_quantizer(bits):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))

    def error(step):
        middle = (2**bits - 1) / 2
        return float((((x / step + middle).round().clamp(0, 2 * middle) - middle) * step - x).square().mean())

    own = error(STEPS[bits])
    assert own == pytest.approx(DISTORTIONS[bits], rel=0.03)
    assert own <= min(error(STEPS[bits] * factor) for factor in (0.85, 0.93, 1.07, 1.15)) * 1.005
    widths = tuple(int(bits == width) for width in (8, 4, 2))
    torch.testing.assert_close(steps_of(torch.tensor([4.0]), widths), torch.tensor([2 * STEPS[bits]]))
