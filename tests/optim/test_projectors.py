"""Projectors: exact, by power iteration, random, and from factors."""

import pytest
import torch

from lowrank_layers.optim.projectors import (
    fit_projector,
    power_projector,
    projector_of_factors,
    random_projector,
    svd_projector,
)

from .common import METHODS


def test_svd_basis_is_the_leading_singular_vectors():
    matrix = torch.randn(30, 50)
    u = torch.linalg.svd(matrix.double())[0][:, :5]
    basis = svd_projector(matrix, 5).double()
    torch.testing.assert_close(basis @ basis.mT, u @ u.mT, atol=1e-6, rtol=0)


def test_power_iteration_converges_to_the_svd():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(40, 40)).Q, torch.linalg.qr(torch.randn(60, 40)).Q
    matrix = u * 0.8 ** torch.arange(40.0) @ v.mT
    exact = svd_projector(matrix, 6)
    basis = random_projector(matrix, 6, 0)
    errors = []
    for _ in range(12):
        basis = power_projector(matrix, 6, basis, 0)
        errors.append(float((basis @ basis.mT - exact @ exact.mT).norm()))
    assert errors[-1] < 1e-3
    # each of the two steps a call contracts by (s7 / s6)^2 = 0.64
    assert errors[5] / errors[1] < 0.64**8 * 2


def test_power_follows_a_subspace_that_moves():
    """As a projector does from refresh to refresh: one call is nearly as good as the decomposition."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(40, 6)).Q, torch.randn(6, 60)
    basis, drift = None, torch.randn(40, 6)
    for k in range(10):
        matrix = (u + 0.02 * k * drift) @ v + 0.05 * torch.randn(40, 60)
        basis = power_projector(matrix, 6, basis, 0)
        best = (svd_projector(matrix, 6).mT @ matrix).norm()
        assert (basis.mT @ matrix).norm() > 0.9999 * best


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["zero", "rank one", "tiny", "huge"])
def test_projectors_are_orthonormal_whatever_the_gradient(method, what):
    torch.manual_seed(0)
    matrix = {
        "zero": torch.zeros(12, 20),
        "rank one": torch.outer(torch.randn(12), torch.randn(20)),
        "tiny": 1e-25 * torch.randn(12, 20),
        "huge": 1e18 * torch.randn(12, 20),
    }[what]
    basis = None
    for _ in range(3):
        basis = fit_projector(matrix, 4, method, basis, 0)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4), atol=1e-5, rtol=0)
    if what == "rank one" and method != "random":
        torch.testing.assert_close(basis @ (basis.mT @ matrix), matrix, atol=1e-5, rtol=1e-4)


def test_a_zero_gradient_leaves_the_power_projector():
    basis = random_projector(torch.zeros(12, 20), 4, 0)
    assert torch.equal(power_projector(torch.zeros(12, 20), 4, basis, 0), basis)


def test_factors_give_the_leading_directions_of_their_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    basis = projector_of_factors(left, right, 4, None, 0)
    exact = torch.linalg.svd(left @ right.mT).U[:, :4]
    torch.testing.assert_close(basis @ basis.mT, exact @ exact.mT, rtol=1e-4, atol=1e-5)


def test_factors_of_a_lower_rank_keep_directions_of_the_last_projector():
    generator = torch.Generator().manual_seed(0)
    before = torch.linalg.qr(torch.randn(20, 4, generator=generator)).Q
    left, right = torch.randn(20, 1, generator=generator), torch.randn(50, 1, generator=generator)
    basis = projector_of_factors(left, right, 4, before, 0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4), rtol=0, atol=1e-5)
    span = torch.linalg.qr(torch.cat([left, before[:, :3]], 1)).Q
    torch.testing.assert_close(basis @ basis.mT, span @ span.mT, rtol=0, atol=1e-5)
