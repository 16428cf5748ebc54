"""Leading singular triplets against torch.linalg.svd, by every method, of dense and of sparse matrices."""

import pytest
import torch

from lowrank_layers.linalg import (
    SparseMatrix,
    exact_svd,
    gram_svd,
    krylov_svd,
    leading_eigenvectors,
    leading_svd,
    randomized_svd,
)

from ..decompose.tensors import distance_from_orthonormal, randn, with_spectrum


def exact(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    u, s, vh = exact_svd(matrix)
    return u[:, :rank], s[:rank], vh[:rank]


METHODS = {
    "exact": exact,
    "gram": gram_svd,
    "randomized": randomized_svd,
    "krylov": krylov_svd,
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
on_sparse = pytest.mark.parametrize("method", [gram_svd, randomized_svd, krylov_svd], ids=lambda f: f.__name__)
shapes = pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (40, 1), (1, 40)], ids=str)


def decaying(shape: tuple[int, int], ratio: float = 0.5) -> torch.Tensor:
    return with_spectrum(*shape, ratio ** torch.arange(min(shape), dtype=torch.float64))


@methods
@shapes
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_it_returns_the_leading_triplets(method, shape, rank):
    matrix = decaying(shape)
    rank = min(rank, *shape)
    u, s, vh = method(matrix, rank)
    assert u.shape == (shape[0], rank)
    assert vh.shape == (rank, shape[1])
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose(s, values[:rank], rtol=1e-7, atol=1e-9 * float(values[0]))
    assert bool((s[:-1] >= s[1:]).all())
    assert distance_from_orthonormal(u) < 1e-9
    assert distance_from_orthonormal(vh.mT) < 1e-9
    error = torch.linalg.matrix_norm((u * s) @ vh - matrix, 2)
    assert float(error) <= float(values[rank] if rank < len(values) else 0) * (1 + 1e-6) + 1e-9 * float(values[0])


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_and_input_are_kept(method, dtype):
    matrix = decaying((15, 10)).to(dtype)
    before = matrix.clone()
    assert {part.dtype for part in method(matrix, 3)} == {dtype}
    assert torch.equal(matrix, before)


@methods
def test_vectors_are_orthonormal_where_singular_values_vanish(method):
    matrix = randn(20, 3, seed=1) @ randn(3, 15, seed=2)
    u, s, vh = method(matrix, 6)
    assert distance_from_orthonormal(u) < 1e-9
    assert distance_from_orthonormal(vh.mT) < 1e-9
    assert float(s[3:].max()) < 1e-6 * float(s[0])
    assert torch.allclose((u * s) @ vh, matrix, atol=1e-6 * float(s[0]))


@on_sparse
@shapes
def test_a_sparse_matrix_gives_what_its_dense_form_gives(method, shape):
    dense = torch.where(randn(*shape, seed=3).abs() > 0.8, randn(*shape, seed=4), 0)
    rank = min(4, *shape)
    u, s, vh = method(SparseMatrix.of(dense), rank)
    values = torch.linalg.svdvals(dense)
    if method is not randomized_svd or rank + 10 >= min(shape):  # that one is approximate on a flat spectrum
        assert torch.allclose(s, values[:rank], rtol=1e-7)
    assert torch.allclose((u.mT @ dense @ vh.mT), torch.diag(s), atol=1e-7 * float(values[0]))


def test_gram_loses_what_lies_below_the_root_of_the_precision_and_krylov_does_not():
    """Squares of singular values below 1e-8 of the largest are rounding errors."""
    matrix = with_spectrum(30, 12, torch.tensor([1.0, 1e-4, 1e-11]))
    assert torch.allclose(gram_svd(matrix, 2)[1], torch.tensor([1.0, 1e-4], dtype=torch.float64), rtol=1e-6)
    assert float(krylov_svd(matrix, 3)[1][2]) == pytest.approx(1e-11, rel=1e-3)
    assert float(exact_svd(matrix)[1][2]) == pytest.approx(1e-11, rel=1e-3)


@pytest.mark.parametrize("method", [randomized_svd, krylov_svd], ids=lambda f: f.__name__)
def test_seeds_repeat_and_leave_the_global_generator_alone(method):
    matrix = randn(60, 50)
    before = torch.get_rng_state()
    first, same, other = (method(matrix, 4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_more_power_iterations_bring_the_randomized_range_nearer():
    """Halko et al., 2011: of a slowly decaying spectrum one product sees little."""
    matrix = with_spectrum(80, 60, 1 / torch.arange(1, 61, dtype=torch.float64).sqrt())
    best = float(torch.linalg.svdvals(matrix)[5:].norm())

    def error(iterations: int) -> float:
        u, s, vh = randomized_svd(matrix, 5, oversample=2, power_iterations=iterations)
        return float(((u * s) @ vh - matrix).norm())

    assert best * (1 - 1e-12) <= error(6) < error(1) < error(0)
    assert error(6) < 1.001 * best


def test_leading_eigenvectors_come_largest_first_in_fp64():
    vectors = torch.linalg.qr(randn(6, 6)).Q
    values = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    found = leading_eigenvectors(((vectors * values) @ vectors.mT).float(), 3)
    assert found.dtype == torch.float64
    assert torch.allclose((found.mT @ vectors[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("shape", [(520, 700), (700, 520), (530, 530)], ids=str)
@pytest.mark.parametrize("ratio", [0.999, 0.95], ids=["Gram matrix", "exact"])
def test_of_large_matrices_the_best_approximation_is_found_to_rounding(shape, ratio):
    """Where singular values fall too far for eigenvectors of the Gram matrix, it is an SVD."""
    matrix, rank = decaying(shape, ratio), 300
    u, s, vh = leading_svd(matrix, rank)
    exact_u, exact_s, exact_vh = exact(matrix, rank)
    assert u.shape == exact_u.shape
    assert vh.shape == exact_vh.shape
    assert torch.allclose(s, exact_s, rtol=1e-9, atol=0)
    assert torch.allclose((u * s) @ vh, (exact_u * exact_s) @ exact_vh, rtol=0, atol=1e-9 * float(s[0]))
    assert distance_from_orthonormal(u) < 1e-9
    assert distance_from_orthonormal(vh.mT) < 1e-9
