"""Coefficients with bits by direction: packing, gains, and products with levels as they are."""

import pytest
import torch

from lowrank_layers.kv_cache.bit_coefficients import (
    GAINS,
    LEAST_GAIN,
    PER_OCTAVE,
    BitCoefficients,
    gain_factors,
)
from lowrank_layers.kv_cache.bit_planes import packed, unpacked

WIDTHS = (3, 6, 16, 8, 8)


def store(count=0, *, batch=2, groups=2, spread=1.0):
    torch.manual_seed(0)
    made = BitCoefficients(WIDTHS, torch.rand(1, groups, sum(WIDTHS)) + 0.5)
    values = torch.randn(batch, groups, sum(WIDTHS), count) * spread
    made.append(values)
    return made, values


@pytest.mark.parametrize(
    "widths",
    [WIDTHS, (0, 2, 0, 4, 8), (1, 0, 0, 0, 0), (0, 0, 8, 0, 0), (0, 0, 0, 8, 0), (2, 4, 8, 0, 0), (0, 0, 0, 0, 8)],
)
def test_packing_and_back(widths):
    highest = torch.tensor([2**w - 1 for w, count in zip((8, 4, 3, 2, 1), widths, strict=True) for _ in range(count)])
    levels = (torch.rand(2, 3, sum(widths), 7) * (highest[:, None] + 1)).floor().to(torch.uint8)
    codes = packed(levels, widths)
    assert torch.equal(unpacked(codes, widths), levels)
    bits = 8 * widths[0] + 4 * widths[1] + 3 * widths[2] + 2 * widths[3] + widths[4]
    assert sum(code.shape[2] for code in codes.values()) * 8 == bits


def test_what_no_gain_clips_is_off_by_at_most_half_a_step():
    made, values = store(200, spread=0.3)
    gains = gain_factors(made.codes["gains"], torch.float32)[:, :, None]
    inside = (values.abs() / gains) <= made.centres(values)[:, None] + 0.5
    off = (made.read(0, 200, torch.float32) - values).abs()
    assert bool((off <= 0.5 * gains + 1e-5)[inside.expand_as(off)].all())
    # one bit holds 1.6 standard deviations on either side, and more bits hold more
    assert float(inside[:, :, : -WIDTHS[-1]].float().mean()) > 0.9


def test_gains_are_as_good_as_those_of_a_full_search():
    made, values = store(300, spread=4.0)
    weights, best = made.weights[..., None], None
    middle = made.centres(values)[:, None]
    for gain in range(GAINS):
        factor = 2.0 ** ((LEAST_GAIN + gain) / PER_OCTAVE)
        held = ((values / factor + middle).round().clamp_min(0).minimum(2 * middle) - middle) * factor
        error = ((held - values).square() * weights).sum(2)
        best = error if best is None else torch.minimum(best, error)
    own = ((made.read(0, 300, torch.float32) - values).square() * weights).sum(2)
    assert float(own.sum()) <= 1.003 * float(best.sum())
    assert bool((own >= best - 1e-3).all())


def test_outliers_are_not_clipped_and_small_tokens_stay_small():
    made = BitCoefficients((3, 6, 0, 8, 0), torch.ones(1, 1, 17))
    values = torch.randn(1, 1, 17, 300, generator=torch.Generator().manual_seed(1))
    values[..., :100] *= 5
    values[..., 100:200] *= 0.05
    made.append(values)
    off = (made.read(0, 300, torch.float32) - values).square().sum(2) / values.square().sum(2)
    assert float(off[..., :100].mean()) < 0.1
    assert float(off[..., 100:200].mean()) < 0.3


def test_products_with_levels_are_products_with_what_is_read():
    made, _ = store(70)
    read = made.read(0, 70, torch.double)
    rows, shift, weights = (torch.rand(2, 2, 5, n, dtype=torch.double) for n in (sum(WIDTHS), 1, 70))
    torch.testing.assert_close(made.scores(rows, shift), rows @ read + shift)
    torch.testing.assert_close(made.mixed(weights), weights @ read.mT)
    by_tile, shifts = (torch.rand(2, 2, 3, 5, n, dtype=torch.double) for n in (sum(WIDTHS), 32))
    found = made.tile_scores(by_tile, shifts, 32).transpose(2, 3).flatten(3)[..., :70]
    for token in (0, 31, 32, 69):
        tile, offset = divmod(token, 32)
        expected = (by_tile[:, :, tile] @ read[..., token, None])[..., 0] + shifts[:, :, tile, :, offset]
        torch.testing.assert_close(found[..., token], expected)


def test_tokens_are_appended_cut_and_selected():
    made, values = store(50)
    made.append(values[..., :20])
    assert made.tokens == 70
    whole = made.read(0, 70, torch.float32)
    torch.testing.assert_close(whole[..., 50:], whole[..., :20])
    made.truncate(33)
    made.over_batch(lambda t: t[[1]])
    torch.testing.assert_close(made.read(0, 33, torch.float32), whole[[1], ..., :33])
    assert made.empty().tokens == 0
