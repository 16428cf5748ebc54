"""Products of two factors in pivot form."""

import pytest
import torch

from lowrank_layers.decompose.pivot import pivot_columns


@pytest.mark.parametrize("shape", [(9, 12, 4), (12, 9, 9), (5, 7, 1), (6, 6, 5)], ids=str)
@pytest.mark.parametrize("lost", [0, 1])
def test_it_is_the_same_matrix_in_fewer_numbers(shape, lost):
    m, n, r = shape
    up, down = torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64)
    down[: min(lost, r - 1)] = down[-1]  # two equal rows: a rank of r - 1
    columns, coefficients, order = pivot_columns(up, down)
    product = torch.empty(m, n, dtype=torch.float64)
    product[:, order] = torch.cat([columns, columns @ coefficients], 1)
    assert torch.allclose(product, up @ down, rtol=1e-12, atol=1e-12)
    assert torch.equal(product[:, order[:r]], columns)
    assert columns.numel() + coefficients.numel() == r * (m + n - r)


def test_autocast_changes_nothing():
    up, down = torch.randn(9, 3), torch.randn(3, 12)
    expected = pivot_columns(up, down)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pivot_columns(up, down)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
