"""Square roots of second moments, singular ones included."""

import pytest
import torch

from lowrank_layers.linalg import damp, psd_roots

eye = torch.eye(6, dtype=torch.float64)


def moment(samples: int, n: int = 6) -> torch.Tensor:
    x = torch.randn(samples, n, dtype=torch.float64)
    return x.mT @ x / samples


def test_roots_of_a_regular_moment():
    a = moment(50)
    pair = psd_roots(a)
    assert torch.allclose(pair.root @ pair.root, a, atol=1e-12)
    assert torch.allclose(pair.root @ pair.inverse, eye, atol=1e-10)
    assert torch.allclose(pair.inverse @ a @ pair.inverse, eye, atol=1e-10)
    assert torch.allclose(pair.root, pair.root.mT, atol=1e-12)
    assert torch.allclose(pair.inverse, pair.inverse.mT, atol=1e-12)
    assert float(torch.linalg.eigvalsh(pair.root)[0]) > 0


def test_it_works_in_fp64_whatever_comes_in():
    a = moment(50).float()
    pair = psd_roots(a)
    assert pair.root.dtype == pair.inverse.dtype == torch.float64
    assert torch.allclose(pair.root @ pair.root, a.double(), atol=1e-12)


def test_a_vector_is_a_diagonal_matrix():
    values = torch.tensor([4.0, 1.0, 0.25, 9.0])
    vector, matrix = psd_roots(values), psd_roots(torch.diag(values))
    right = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(torch.diag(vector.root), matrix.root, atol=1e-12)
    assert torch.allclose(torch.diag(vector.inverse), matrix.inverse, atol=1e-12)
    assert torch.allclose(vector.times(right), matrix.times(right), atol=1e-12)
    assert torch.allclose(vector.divide(right), matrix.divide(right), atol=1e-12)
    assert torch.allclose(matrix.times(right), torch.diag(values.double().sqrt()) @ right, atol=1e-12)
    assert torch.allclose(vector.divide(vector.times(right)), right, atol=1e-12)


@pytest.mark.parametrize("floor", [1e-6, 1e-3])
def test_a_singular_moment_is_raised_to_the_floor(floor):
    """Fewer samples than features: Cholesky would fail here."""
    a = moment(2)
    pair = psd_roots(a, floor=floor)
    largest = float(torch.linalg.eigvalsh(a)[-1])
    values = torch.linalg.eigvalsh(pair.root).square()
    assert float(values[0]) == pytest.approx(floor * largest, rel=1e-6)
    assert float(values[-1]) == pytest.approx(largest, rel=1e-12)
    assert torch.allclose(pair.root @ pair.inverse, eye, atol=1e-8)
    # what was seen is not disturbed
    x = torch.linalg.eigh(a).eigenvectors[:, -2:]
    assert torch.allclose(pair.root @ pair.root @ x, a @ x, atol=1e-10)
    dead = psd_roots(torch.tensor([4.0, 0.0]), floor=floor)
    assert float(dead.inverse[1]) == pytest.approx((4 * floor) ** -0.5, rel=1e-12)


def test_negative_rounding_is_clamped():
    pair = psd_roots(torch.diag(torch.tensor([1.0, -1e-9])))
    assert bool(pair.root.isfinite().all())
    assert bool(pair.inverse.isfinite().all())


@pytest.mark.parametrize("zero", [torch.zeros(4), torch.zeros(4, 4)], ids=["diagonal", "full"])
def test_no_data_is_no_preference(zero):
    right = torch.randn(4, 2, dtype=torch.float64)
    pair = psd_roots(zero)
    assert torch.allclose(pair.times(right), right, atol=1e-12)
    assert torch.allclose(pair.divide(right), right, atol=1e-12)


def test_only_the_symmetric_part_counts():
    a = moment(50)
    skew = torch.triu(torch.ones(6, 6, dtype=torch.float64), 1)
    assert torch.allclose(psd_roots(a + skew - skew.mT).root, psd_roots(a).root, atol=1e-10)


def test_units_factor_out():
    a = moment(50)
    assert torch.allclose(psd_roots(a * 1e-12).root, psd_roots(a).root * 1e-6, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("amount", [0.0, 0.1, 1.0])
def test_damping_adds_a_share_of_the_mean_eigenvalue(amount):
    a = moment(3)
    before = a.clone()
    values = torch.linalg.eigvalsh(a)
    assert torch.allclose(torch.linalg.eigvalsh(damp(a, amount)), values + amount * values.mean(), atol=1e-12)
    assert torch.equal(a, before)
    vector = a.diagonal()
    assert torch.allclose(torch.diag(damp(vector, amount)), damp(torch.diag(vector), amount), atol=1e-12)
