"""Running means and second moments: those of all rows at once, whatever their parts and their size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_layers.calibrate.moments import Moments, sums

CPU = torch.device("cpu")


def off(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


@pytest.mark.parametrize("parts", [[60], [1, 59], [20, 0, 13, 27]], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_the_covariance_is_that_of_torch(parts, groups):
    rows = torch.randn(groups, 60, 4, dtype=torch.float64) * 3 + 1
    moments = Moments.zeros(4, CPU, groups=groups)
    for part in rows.split(parts, dim=1):
        moments.update(part[0] if groups == 1 else part)
    assert moments.rows == 60
    for k in range(groups):
        each = moments.group(k)
        assert torch.allclose(each.mean, rows[k].mean(0))
        assert torch.allclose(each.second, rows[k].mT @ rows[k] / 60)
        assert torch.allclose(each.covariance(), rows[k].mT.cov(correction=0))


def test_one_hot_rows_have_a_diagonal_that_is_not_centred():
    indices = torch.tensor([[0, 2, 2], [4, 2, 0]])
    moments = Moments.zeros(5, CPU, diagonal=True)
    for part in indices:
        moments.update_counts(part)
    moments.update_counts(indices[:0])
    share = torch.tensor([2, 0, 3, 0, 1], dtype=torch.float64) / 6
    assert torch.allclose(moments.mean, share)
    assert torch.allclose(moments.covariance(), share)


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1.0, 1e10, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_squares_neither_overflow_nor_vanish(size, dtype, autocast):
    rows = torch.randn(50, 6, dtype=torch.float64)
    moments = Moments.zeros(6, CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for part in (rows * size).to(dtype).split(20):
            moments.update(part)
        total, products = sums((rows * size).to(dtype), (2 * rows * size).to(dtype))
    assert off(moments.second / size**2, rows.mT @ rows / 50) < 1e-6
    assert off(moments.mean / size, rows.mean(0)) < 1e-6
    assert off(products / size**2, 2 * rows.mT @ rows) < 1e-6
    assert off(total / size, 2 * rows.sum(0)) < 1e-6
