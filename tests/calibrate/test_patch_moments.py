"""Moments of patches from shifted inputs are those of the patches themselves."""

import pytest
import torch
from torch import nn

from lowrank_layers.calibrate import patch_moments
from lowrank_layers.calibrate.moments import sums
from lowrank_layers.calibrate.patch_moments import patch_sums
from lowrank_layers.layers.patches import input_rows

CASES = {
    "same": (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 9, 8)),
    "valid": (nn.Conv2d(3, 4, 3), (5, 3, 9, 8)),
    "wider": (nn.Conv2d(2, 4, 3, padding=2), (2, 2, 9, 10)),
    "five": (nn.Conv2d(3, 4, 5, padding=2), (2, 3, 12, 11)),
    "oblong": (nn.Conv2d(2, 4, (3, 5), padding=(1, 0)), (2, 2, 9, 10)),
    "flat": (nn.Conv2d(2, 4, (1, 3), padding=(0, 1)), (2, 2, 4, 10)),
    "1d, uneven": (nn.Conv1d(2, 4, 4, padding="same"), (3, 2, 11)),
    "3d": (nn.Conv3d(2, 4, 3, padding=1), (2, 2, 6, 7, 6)),
}


@pytest.mark.parametrize("entries", [1, 10**6], ids=["sample by sample", "at once"])
@pytest.mark.parametrize("pair", [False, True], ids=["one", "two inputs"])
@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_the_patches(name, pair, entries, monkeypatch):
    monkeypatch.setattr(patch_moments, "_ENTRIES", entries)
    layer, shape = CASES[name]
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    total, products, count = patch_sums(layer, x, y if pair else None)
    rows, others = (torch.cat(list(input_rows(layer, each))) for each in (x, y if pair else x))
    expected_total, expected_products = sums(others, rows)
    assert count == len(rows)
    torch.testing.assert_close(total, expected_total)
    torch.testing.assert_close(products, expected_products)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 0.0, float("nan")])
def test_half_precision_and_sizes_that_would_overflow(scale):
    """Large, tiny, empty and broken inputs are left to the sums of rows, which scale them."""
    layer, shape = CASES["same"]
    x = scale * torch.randn(shape)
    assert (patch_sums(layer, x) is None) == (scale != 1.0)
    if scale == 1.0:
        half = x.bfloat16()
        for ours, exact in zip(patch_sums(layer, half), patch_sums(layer, half.double()), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Linear(9, 4),
    ],
)
def test_other_layers_are_left_to_their_rows(layer):
    assert patch_sums(layer, torch.randn(2, 4, 9, 9)) is None
    assert patch_sums(CASES["same"][0], torch.randn(2, 3, 5, 9)) is None  # the borders are most of it
