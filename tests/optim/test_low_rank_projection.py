"""What a projected step is, by its definition and against torch's own optimizers."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .common import METHODS, OPTIMIZERS, data, net, one, same, train


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (8, 8), (6, 4, 3, 3), (40, 2, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_sgd_steps_along_the_projected_gradient(shape, method):
    p = one(shape)
    before, gradient = p.detach().clone(), p.grad.flatten(1)
    optimizer = lr.LowRankProjection(torch.optim.SGD([p], lr=0.5), rank=3, method=method, scale=0.25)
    optimizer.step()
    basis = optimizer.state_dict()["state"][0]["projector"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3), atol=1e-5, rtol=0)
    left = gradient.shape[0] < gradient.shape[1]
    kept = basis @ basis.mT @ gradient if left else gradient @ basis @ basis.mT
    torch.testing.assert_close(p.detach(), before - 0.5 * 0.25 * kept.view(shape), atol=1e-5, rtol=0)
    assert basis.shape[0] == min(gradient.shape)


def test_svd_keeps_most_of_the_gradient():
    p = one()
    before, gradient = p.detach().clone(), p.grad
    lr.LowRankProjection(torch.optim.SGD([p], lr=1.0), rank=4).step()
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close(before - p.detach(), u[:, :4] * s[:4] @ vh[:4], atol=1e-5, rtol=0)


def test_coupled_decay_joins_the_gradient_and_decoupled_decay_shrinks_the_whole_weight():
    p, q = one(), one()
    weight, gradient = p.detach().clone(), p.grad.clone()
    coupled = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1, weight_decay=0.3), rank=4)
    coupled.step()
    basis = coupled.state_dict()["state"][0]["projector"]
    whole = gradient + 0.3 * weight
    torch.testing.assert_close(p.detach(), weight - 0.1 * whole @ basis @ basis.mT, atol=1e-5, rtol=0)

    q.grad.zero_()
    lr.LowRankProjection(torch.optim.AdamW([q], lr=0.1, weight_decay=0.3), rank=4).step()
    torch.testing.assert_close(q.detach(), weight * (1 - 0.1 * 0.3))


def test_maximize_decays_towards_zero_too():
    p, q = one(), one()
    q.grad.neg_()
    settings = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9}
    lr.LowRankProjection(torch.optim.SGD([p], **settings), rank=4).step()
    lr.LowRankProjection(torch.optim.SGD([q], maximize=True, **settings), rank=4).step()
    torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_full_rank_is_the_optimizer_itself(name):
    """A rank that is not below the shorter side projects nothing: Adam in another basis would be another optimizer."""
    plain, model = net(), net()
    train(plain, OPTIMIZERS[name](plain.parameters()), 5)
    train(model, lr.LowRankProjection(OPTIMIZERS[name](model.parameters()), rank=24), 5)
    same(plain, model)


def test_sgd_with_momentum_is_itself_where_gradients_stay_in_the_subspace():
    """Gradients of rank 3: projecting to 3 directions loses nothing, since SGD does not depend on the basis."""
    torch.manual_seed(0)
    left, right = torch.randn(20, 3), torch.randn(3, 12)
    p, q = one(), one()
    first = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1, momentum=0.9), rank=3, refresh=100)
    second = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for _ in range(6):
        p.grad = left @ torch.randn(3, 3) @ right
        q.grad = p.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(p, q, atol=2e-5, rtol=0)


def test_rotated_momentum_survives_new_projectors():
    """With a new random basis of 11 out of 12 directions in every step, only rotation keeps the momentum."""

    def distance(rotate):
        p, q = one((12, 12)), one((12, 12))
        first = lr.LowRankProjection(
            torch.optim.SGD([p], lr=0.1, momentum=0.9), rank=11, refresh=1, method="random", rotate=rotate
        )
        second = torch.optim.SGD([q], lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(8):
            p.grad = torch.randn(12, 12)
            q.grad = p.grad.clone()
            first.step()
            second.step()
        return float((p - q).detach().norm())

    assert distance("first") < 0.6 * distance("none")


def test_rotating_second_moments_keeps_them_positive_and_their_sum():
    """Gradients with the same four right singular vectors, in another order: a new basis of the same subspace."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(20, 4)).Q, torch.linalg.qr(torch.randn(12, 4)).Q.mT
    p = one()
    inner = torch.optim.Adam([p], betas=(0.9, 0.5))
    optimizer = lr.LowRankProjection(inner, rank=4, refresh=1, rotate="both")
    bases, squares = [], []
    for mix in (torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), torch.randn(4, 4)):
        p.grad = left @ mix @ right
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        bases.append(state["projector"].clone())
        squares.append(state["exp_avg_sq"].clone())
    rotation = bases[1].mT @ bases[0]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(4), atol=1e-5, rtol=0)
    assert not torch.allclose(rotation.abs(), torch.eye(4), atol=0.1)
    rotated = 2 * (squares[1] - 0.5 * (p.grad @ bases[1]).square())  # without the new gradient's part
    assert (rotated > -1e-6).all()
    torch.testing.assert_close(rotated, squares[0] @ rotation.square().mT, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rotated.sum(1), squares[0].sum(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_optimizer_learns_and_its_state_is_small(name, method):
    model = net()
    inner = OPTIMIZERS[name](model.parameters())
    optimizer = lr.LowRankProjection(inner, rank=4, refresh=5, method=method, rotate="both")
    x, y = data()
    start = float(nn.functional.cross_entropy(model(x), y).detach())
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (-loss if "maximize" in name else loss).backward()
        optimizer.step()
    assert float(nn.functional.cross_entropy(model(x), y).detach()) < start
    for p, small in optimizer.projected():
        for value in inner.state[small].values():
            assert not torch.is_tensor(value) or value.numel() < p.numel()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs a torch with Muon")
def test_muon_takes_an_orthonormal_step_in_the_subspace():
    p = one()
    before = p.detach().clone()
    inner = torch.optim.Muon([p], lr=0.1, weight_decay=0.5)
    lr.LowRankProjection(inner, rank=4).step()
    step = torch.linalg.svdvals(p.detach() - (1 - 0.1 * 0.5) * before)
    assert (step[:4] > 0.05).all()
    assert (step[4:] < 1e-5).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_projector_is_refreshed_after_that_many_steps(method):
    p = one()
    optimizer = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1), rank=3, refresh=3, method=method)
    seen = []
    for k in range(7):
        p.grad = torch.randn(20, 12, generator=torch.Generator().manual_seed(k))
        optimizer.step()
        seen.append(optimizer.state_dict()["state"][0]["projector"].clone())
    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [True, True, False, True, True, False]


def test_random_projectors_come_from_the_seed_alone():
    p, q = one(), one()
    before = torch.get_rng_state()
    first = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1), rank=3, method="random", refresh=1, seed=3)
    second = lr.LowRankProjection(torch.optim.SGD([q], lr=0.1), rank=3, method="random", refresh=1, seed=3)
    seen = []
    for _ in range(2):
        first.step()
        seen.append(first.state_dict()["state"][0]["projector"].clone())
    assert torch.equal(torch.get_rng_state(), before)
    second.step()
    second.step()
    assert torch.equal(p, q)
    assert not torch.equal(*seen)
