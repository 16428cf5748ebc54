"""Moments of a layer's inputs in two models."""

from __future__ import annotations

import pytest
import torch

from lowrank_layers.calibrate.moments import Moments, sums
from lowrank_layers.compress.paired_moments import PairedMoments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_moments_about_other_centres_are_those_of_the_moved_rows(dtype):
    """By the rows themselves, with more columns than are converted at once."""
    n = 1030
    generator = torch.Generator().manual_seed(0)
    x, x_dense = torch.randn(2, 40, n, generator=generator, dtype=torch.float64) + 0.5
    mean, target = torch.randn(2, n, generator=generator, dtype=torch.float64)
    moments = PairedMoments.before_any(Moments.zeros(n, torch.device("cpu")), dtype)
    moments.add(sums(x), sums(x, x_dense), len(x))
    second, cross = moments.about(mean, target)
    rows, other = torch.randn(2, 3, n, generator=generator, dtype=torch.float64)
    tight = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-3}
    for found, left in ((second, x - mean), (cross, x_dense - target)):
        expected = left.mT @ (x - mean) / len(x)
        assert torch.allclose(found.after(rows), rows @ expected, **tight)
        square = torch.zeros(n, n, dtype=torch.float64)
        assert torch.allclose(other @ found.add_to_(square, -0.5), other @ expected * -0.5, **tight)
