"""The compiled second moment is the product that it stands for."""

import pytest
import torch

from lowrank_layers.kv_cache import moment_kernel

SHAPES = {
    "whole runs": (1, 1, 512, 192),
    "rows left over, batch and groups": (2, 3, 333, 64),
    "one block": (1, 2, 257, 32),
    "a width of no whole vectors": (1, 1, 300, 33),
    "few rows": (2, 1, 10, 64),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product_of_rows(shape, threads):
    torch.manual_seed(0)
    rows = torch.randn(*SHAPES[shape][:3], SHAPES[shape][3] + 5)[..., 2:-3]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = moment_kernel.second_moment(rows)
    finally:
        torch.set_num_threads(before)
    exact = rows.double().mT @ rows.double()
    # rounding of a sum is bounded by the sum of the absolute values
    bound = 2.0**-24 * (rows.shape[2] + 1) * (rows.abs().double().mT @ rows.abs().double())
    assert ((found - exact).abs() <= bound).all()


def test_gradients_go_through_the_product():
    rows = torch.randn(1, 1, 300, 32, requires_grad=True)
    moment_kernel.second_moment(rows).diagonal(dim1=-2, dim2=-1).sum().backward()
    torch.testing.assert_close(rows.grad, 2 * rows.detach())
