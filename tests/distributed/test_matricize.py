"""How gradients are seen as matrices."""

import pytest
import torch

from lowrank_layers.distributed.matricize import matricize, matricized_shape, thin_matmul, unmatricize

SHAPES = {
    (): None,
    (7,): None,
    (5, 7): (1, 5, 7),
    (3, 40, 50): (3, 40, 50),  # experts
    (16, 8, 3): (1, 16, 24),  # a kernel: 16 + 24, not 48 + 8
    (8, 16, 3): (1, 24, 16),
    (64, 64, 3, 3): (1, 192, 192),  # 384 numbers a rank; by output channel they would be 640
    (16, 3, 3, 3): (1, 16, 27),
    (64, 16, 1, 1): (1, 64, 16),
    (32, 1, 3, 3): (1, 32, 9),  # depthwise
    (8, 8, 3, 3, 3): (1, 24, 72),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    assert matricized_shape(torch.Size(shape)) == SHAPES[shape]


@pytest.mark.parametrize("shape", [shape for shape, found in SHAPES.items() if found])
def test_there_and_back(shape):
    gradient = torch.randn(shape)
    matrices = matricize(gradient)
    assert tuple(matrices.shape) == SHAPES[shape]
    assert torch.equal(unmatricize(matrices, shape), gradient)


def test_a_convolution_that_factors_over_both_kernel_sides_has_rank_one():
    """out x height against in x width."""
    left, right = torch.randn(8, 3), torch.randn(8, 5)
    kernel = torch.einsum("oh,iw->oihw", left, right)
    assert int(torch.linalg.matrix_rank(matricize(kernel)[0])) == 1


def test_thin_matmul():
    matrix, thin = torch.randn(3, 40, 30), torch.randn(3, 30, 2)
    torch.testing.assert_close(thin_matmul(matrix, thin), matrix @ thin)
    torch.testing.assert_close(thin_matmul(matrix.mT, torch.ones(3, 40, 1)), matrix.mT @ torch.ones(3, 40, 1))
