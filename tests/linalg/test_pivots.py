"""Pivot rows: all rows follow from them, with small coefficients."""

import pytest
import torch

from lowrank_layers.linalg import pivot_rows
from lowrank_layers.linalg.pivots import LARGEST

SHAPES = [(1, 1), (7, 1), (7, 3), (12, 11), (8, 8), (200, 60)]


def check(matrix: torch.Tensor) -> None:
    rank = matrix.shape[1]
    order, coefficients = pivot_rows(matrix)
    assert sorted(order.tolist()) == list(range(len(matrix)))
    assert coefficients.shape == (len(matrix) - rank, rank)
    assert not coefficients.numel() or float(coefficients.abs().max()) <= LARGEST * (1 + 1e-9)
    error = matrix[order[rank:]] - coefficients @ matrix[order[:rank]]
    assert float(torch.linalg.vector_norm(error)) <= 1e-12 * float(torch.linalg.vector_norm(matrix))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_rows_follow_from_the_pivots(shape):
    check(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_of_a_matrix_of_smaller_rank_too(rank):
    check(torch.randn(30, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64))


def test_the_scale_of_columns_does_not_matter():
    matrix = torch.randn(40, 10, dtype=torch.float64)
    scaled = matrix * torch.logspace(-150, 150, 10, dtype=torch.float64)
    (order, coefficients), (same, again) = pivot_rows(matrix), pivot_rows(scaled)
    assert torch.equal(order, same)
    assert torch.allclose(coefficients, again, rtol=1e-9, atol=1e-11)


def test_growth_of_partial_pivoting_is_undone():
    """LU with partial pivoting takes the first rows of this matrix, from which the last follows with 2 ** 18."""
    n = 20
    matrix = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    check(torch.cat([matrix, -torch.ones(1, n, dtype=torch.float64)])[:, :-1])
