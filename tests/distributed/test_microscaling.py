"""Blocks of integers with a shared power of two."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lowrank_layers.distributed.microscaling import BLOCK, pack, padded, unpack

BITS = (8, 16)


def numbers(seed, rows=3, blocks=4, spread=8):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-spread, spread + 1, (rows, blocks, 1), generator=generator)
    return (torch.randn(rows, blocks, BLOCK, generator=generator) * 10.0**sizes).view(rows, -1)


@pytest.mark.parametrize("bits", BITS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_rounding_is_at_most_a_step_of_the_block(bits, seed):
    rows = numbers(seed)
    back = unpack(pack(rows, bits), bits)
    greatest = rows.view(3, -1, BLOCK).abs().amax(-1, keepdim=True)
    # at most 1/64 of the greatest number (8 bits), which may be cut by a whole step
    bound = greatest / (2 ** (bits - 1) - 1)
    assert bool(((rows - back).view(3, -1, BLOCK).abs() <= bound).all())


@pytest.mark.parametrize("bits", BITS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_what_was_packed_packs_to_itself(bits, seed):
    packed = pack(numbers(seed), bits)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_powers_of_two_are_exact_over_the_whole_range(bits):
    powers = torch.tensor([2.0**k for k in range(-112, 120)])
    rows = torch.zeros(len(powers), BLOCK)
    rows[:, 5] = powers
    assert torch.equal(unpack(pack(rows, bits), bits), rows)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("extreme", [0.0, 1e-45, -1e-38, 3.4e38, -3.4e38])
def test_extremes(bits, extreme):
    rows = torch.full((1, BLOCK), extreme)
    # below 2^-126 a code is worth too much to say more than zero
    torch.testing.assert_close(unpack(pack(rows, bits), bits), rows, rtol=1e-2, atol=2.0**-126)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_what_is_not_finite_is_not_a_number(bits, bad):
    rows = numbers(0)
    rows[1, BLOCK + 3] = bad
    nan = unpack(pack(rows, bits), bits).isnan()
    assert bool(nan[1, BLOCK : 2 * BLOCK].all())
    assert int(nan.sum()) == BLOCK


@pytest.mark.parametrize("bits", BITS)
def test_bytes(bits):
    assert pack(torch.zeros(2, 5 * BLOCK), bits).shape == (2, 5 * (BLOCK * bits // 8 + 1))
    assert [padded(count) for count in (0, 1, 32, 33)] == [0, 32, 32, 64]
