"""The truncated SVD: Eckart-Young's bound by every method, and orthonormal vectors where singular values vanish."""

import pytest
import torch
from hypothesis import given, strategies as st

import lowrank_layers as lr

from ..contracts.tables import DERANDOMIZED, SVD_METHODS
from .tensors import distance_from_orthonormal, randn, with_spectrum

methods = pytest.mark.parametrize("method", SVD_METHODS)


@methods
@DERANDOMIZED
@given(shape=st.tuples(st.integers(1, 14), st.integers(1, 14)), rank=st.integers(1, 16), seed=st.integers(0, 2**20))
def test_the_error_is_the_tail_of_the_singular_values(method, shape, rank, seed):
    matrix = randn(*shape, seed=seed)
    f = lr.svd(matrix, rank, method=method)
    values = torch.linalg.svdvals(matrix)
    assert f.rank == min(rank, *shape)
    tail = float(torch.linalg.vector_norm(values[f.rank :]) / torch.linalg.vector_norm(values))
    # a square of 1e-16 is what the Gram matrix rounds away
    assert f.relative_error(matrix) == pytest.approx(tail, rel=1e-8, abs=1e-13)
    assert torch.allclose(f.s, values[: f.rank], rtol=1e-7, atol=1e-12)
    assert distance_from_orthonormal(f.u) < 1e-10
    assert distance_from_orthonormal(f.vh.mT) < 1e-6


@methods
@pytest.mark.parametrize("shape", [(60, 40), (24, 120), (120, 24), (1, 9), (9, 1)], ids=str)
def test_it_resolves_a_decaying_spectrum(method, shape):
    values = 0.7 ** torch.arange(min(shape), dtype=torch.float64)
    matrix = with_spectrum(*shape, values)
    for rank in (1, 5, 12):
        f = lr.svd(matrix, rank, method=method)
        tail = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
        assert f.relative_error(matrix) == pytest.approx(tail, rel=1e-6, abs=1e-13)
        assert bool((f.s[:-1] >= f.s[1:]).all())
        assert torch.allclose(f.s, values[:rank], rtol=1e-6)
        assert distance_from_orthonormal(f.u) < 1e-12
        assert distance_from_orthonormal(f.vh.mT) < 1e-12


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(20, 100), (100, 20), (30, 30)], ids=str)
def test_vectors_are_orthonormal_when_the_matrix_has_less_than_the_rank(method, dtype, shape):
    matrix = randn(shape[0], 8, seed=1, dtype=dtype) @ randn(8, shape[1], seed=2, dtype=dtype)
    f = lr.svd(matrix, 15, method=method)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert f.relative_error(matrix) < tolerance
    assert distance_from_orthonormal(f.u) < tolerance
    assert distance_from_orthonormal(f.vh.mT) < tolerance


@methods
def test_vectors_are_orthonormal_over_twelve_orders_of_magnitude(method):
    values = 10.0 ** -torch.arange(12, dtype=torch.float64)
    f = lr.svd(with_spectrum(12, 60, values), 10, method=method)
    assert torch.allclose(f.s[:7], values[:7], rtol=1e-5)
    assert distance_from_orthonormal(f.u) < 1e-10
    assert distance_from_orthonormal(f.vh.mT) < 1e-10


def test_the_randomized_method_by_default_on_large_matrices_is_near_the_optimum():
    matrix = with_spectrum(600, 520, 1 / torch.arange(1, 521, dtype=torch.float64)).float()
    f = lr.svd(matrix, 20)
    best = lr.svd(matrix, 20, method="exact").relative_error(matrix)
    assert best <= f.relative_error(matrix) * (1 + 1e-6)
    assert f.relative_error(matrix) < best * 1.001
    assert torch.equal(lr.svd(matrix, 20, seed=0).u, f.u)
    assert not torch.equal(lr.svd(matrix, 20, seed=1).u, f.u)


def test_without_a_rank_it_keeps_everything():
    matrix = randn(7, 4)
    assert lr.svd(matrix).rank == 4
    assert lr.svd(matrix).relative_error(matrix) < 1e-14


def test_it_takes_matrices_only():
    with pytest.raises(lr.LowRankError, match=r"^svd: got shape \(2, 3, 4\), expected 2 dimensions"):
        lr.svd(torch.ones(2, 3, 4), 1)


def test_unknown_methods_are_refused():
    with pytest.raises(lr.LowRankError, match=r"^svd: got method 'lanczos', expected 'auto'"):
        lr.svd(torch.ones(2, 3), 1, method="lanczos")
