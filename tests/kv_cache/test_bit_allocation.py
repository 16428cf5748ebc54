"""Bits by direction: the least error under a limit, as a search over all choices finds it."""

import pytest
import torch

from lowrank_layers.kv_cache.bit_allocation import allocate_bits, distortion, steps_of
from lowrank_layers.kv_cache.quantizers import DISTORTIONS, SCARCE, STEPS, WIDTHS, Directions


def least_error(groups, limit):
    """No choice of bits has a smaller error (the Lagrangian dual), not even one that does not fill whole bytes."""
    allowed = [bits for bits in WIDTHS if bits != 3 or limit < SCARCE * sum(len(group.variances) for group in groups)]
    saved = torch.tensor([1.0 - DISTORTIONS[bits] for bits in (*allowed, 0)], dtype=torch.double)
    bounds = []
    for price in torch.logspace(-8, 1, 400, dtype=torch.double):
        error = -price * limit
        for group in groups:
            costs = torch.tensor([group.bit * bits + (group.first if bits else 0) for bits in (*allowed, 0)])
            each = group.variances.double()[:, None] * (1 - saved) + price * costs
            error = error + each.min(1).values.sum()
        bounds.append(float(error))
    return max(bounds)


@pytest.mark.parametrize("first", [0.0, 3.0])
@pytest.mark.parametrize("bits", [1.2, 2, 4])
def test_no_choice_has_a_clearly_smaller_error(first, bits):
    torch.manual_seed(0)
    for power in (2, 4, 8):
        groups = [
            Directions(torch.rand(n).pow(power).sort(descending=True).values * k, first=first)
            for n, k in ((96, 1.0), (64, 3.0), (192, 0.5))
        ]
        limit = bits * sum(len(group.variances) for group in groups)
        widths = allocate_bits(groups, limit)
        assert all(w[1] % 2 == (w[2] + w[3]) % 4 == (w[2] + w[4]) % 8 == 0 for w in widths)
        spent = sum(map(Directions.cost, groups, widths))
        assert limit - 8 < spent <= limit
        found = sum(distortion(group.variances, each) for group, each in zip(groups, widths, strict=True))
        assert found <= 1.03 * least_error(groups, spent)  # whole bytes cost most where few have bits


def test_bits_follow_the_water_level():
    variances = torch.logspace(0, -6, 64)
    (widths,) = allocate_bits([Directions(variances)], 2 * 64)
    bits = [width for width, count in zip(WIDTHS, widths, strict=True) for _ in range(count)]
    ideal = 0.5 * torch.log2(variances[: len(bits)] / variances[len(bits) - 1]) + 0.5
    assert all(0.5 < b / float(i) <= 4 for b, i in zip(bits, ideal, strict=True))
    assert all(widths[which] for which in (0, 1, 3))


def test_three_bits_are_for_scarce_bits_only():
    variances = torch.logspace(0, -3, 64)
    assert [allocate_bits([Directions(variances)], bits * 64)[0][2] > 0 for bits in (1, 1.4, 1.6, 3)] == [
        True,
        True,
        False,
        False,
    ]


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
