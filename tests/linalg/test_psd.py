"""Roots of second moments, singular ones included."""

import pytest
import torch

from lowrank_layers.linalg import damp, psd_root

EYE = torch.eye(6, dtype=torch.float64)


def moment(samples: int, n: int = 6) -> torch.Tensor:
    x = torch.randn(samples, n, dtype=torch.float64)
    return x.mT @ x / samples


def test_root_of_a_regular_moment():
    a = moment(50)
    root = psd_root(a)
    assert torch.allclose(root.factor.mT @ root.factor, a, rtol=1e-10, atol=1e-10)
    assert torch.equal(root.factor, root.factor.triu())
    m = torch.randn(6, 4, dtype=torch.float64)
    assert torch.allclose(root.times(m), root.factor @ m)
    assert torch.allclose(root.divide(root.times(m)), m)
    assert torch.allclose(root.divide_columns(m.mT) @ root.factor, m.mT)
    assert torch.allclose(a @ root.solve(m), m, atol=1e-9)


@pytest.mark.parametrize("n", [6, 1030], ids=["one block", "several blocks"])
def test_a_ridge_is_added_and_rounding_off_symmetry_is_evened_out(n):
    a = moment(2 * n, n)
    given = a + 1e-9 * torch.randn(n, n, dtype=torch.float64)
    before = given.clone()
    root = psd_root(given, ridge=0.5)
    assert torch.equal(given, before)
    even = (given + given.mT) / 2 + 0.5 * torch.eye(n, dtype=torch.float64)
    assert torch.allclose(root.factor.mT @ root.factor, even, rtol=0, atol=1e-11)
    assert torch.equal(root.factor, root.factor.triu())
    vector = torch.rand(6, dtype=torch.float64)
    assert torch.allclose(psd_root(vector, ridge=0.5).factor.square(), vector + 0.5)


@pytest.mark.parametrize("given", [moment(50), moment(50).diagonal().clone()], ids=["matrix", "diagonal"])
def test_rows_are_multiplied_and_solved_for_in_place(given):
    root, rows = psd_root(given), torch.randn(4, 6, dtype=torch.float64)
    dense = given if given.ndim == 2 else torch.diag(given)
    factor = root.factor if given.ndim == 2 else torch.diag(root.factor)
    assert torch.allclose(root.after(rows), rows @ factor)
    solved = rows.clone()
    assert root.solve_rows_(solved) is solved
    assert torch.allclose(solved @ dense, rows, atol=1e-9)


def test_it_works_in_fp64_whatever_comes_in():
    assert psd_root(moment(50).float()).factor.dtype == torch.float64


def test_a_vector_is_a_diagonal_matrix():
    values = torch.tensor([4.0, 1.0, 0.25, 9.0, 1e-3, 2.0])
    vector, matrix = psd_root(values), psd_root(torch.diag(values))
    m = torch.randn(6, 3, dtype=torch.float64)
    for name in ("times", "divide", "solve"):
        assert torch.allclose(getattr(vector, name)(m), getattr(matrix, name)(m), rtol=1e-8)
    assert torch.allclose(vector.divide_columns(m.mT), matrix.divide_columns(m.mT), rtol=1e-8)


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_singular_moments_stay_finite_and_keep_what_they_have(samples):
    """Fewer samples than features: the moment has rank ``samples``."""
    a = moment(samples)
    root = psd_root(a, floor=1e-9)
    assert torch.isfinite(root.divide(EYE)).all()
    assert torch.allclose(root.factor.mT @ root.factor, a, atol=1e-7)


def test_a_slightly_indefinite_moment_is_clamped():
    """Rounding makes eigenvalues of a sum of squares negative; Cholesky alone would fail."""
    a = torch.diag(torch.tensor([1.0, 0.5, -1e-9], dtype=torch.float64))
    root = psd_root(a)
    assert torch.allclose(root.factor.mT @ root.factor, a, atol=1e-8)
    assert torch.isfinite(root.divide(torch.eye(3, dtype=torch.float64))).all()


def test_zero_means_no_preference():
    for zero in (torch.zeros(6, 6), torch.zeros(6)):
        root = psd_root(zero)
        m = torch.randn(6, 2, dtype=torch.float64)
        assert torch.equal(root.times(m), m)


def test_roots_scale():
    a = moment(50)
    assert torch.allclose(psd_root(a * 1e-12).factor, psd_root(a).factor * 1e-6, rtol=1e-8)


@pytest.mark.parametrize("amount", [0.0, 0.1, 1.0])
def test_damping_adds_a_share_of_the_mean_eigenvalue(amount):
    a = moment(50)
    values = torch.linalg.eigvalsh(a)
    assert torch.allclose(torch.linalg.eigvalsh(damp(a, amount)), values + amount * values.mean(), atol=1e-12)
    vector = torch.rand(6, dtype=torch.float64)
    assert torch.allclose(torch.diag(damp(vector, amount)), damp(torch.diag(vector), amount), atol=1e-12)
