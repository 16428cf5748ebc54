"""Projected gradients against their definition, torch's own optimizers and galore-torch."""

from __future__ import annotations

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.peers import has, peer
from lowrank_layers.optim.basis import factors_basis, fitted, power_basis, random_basis, svd_basis
from tests.contracts.tables import RULES, spectrum
from tests.distributed import worker
from tests.processes import run_processes

METHODS = ("svd", "random", "power")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, maximize=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 10)
    )


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 2, 6, 6, generator=generator), torch.randint(10, (16,), generator=generator)


def train(model, optimizer, steps, after=lambda: None, start=0):
    for k in range(start, start + steps):
        x, y = data(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()
    return model


def same(first, second, tolerance=0.0):
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


def one(shape=(20, 12), dtype=torch.float32, seed=0):
    """A parameter with a gradient."""
    torch.manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, dtype=dtype))
    p.grad = torch.randn(shape, dtype=dtype)
    return p


# --- what a step is ---------------------------------------------------------------------------------------------


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
    """Nothing is saved by projecting to all directions; Adam in another basis would be another optimizer."""
    plain, model = net(), net()
    train(plain, OPTIMIZERS[name](plain.parameters()), 5)
    train(model, lr.LowRankProjection(OPTIMIZERS[name](model.parameters()), rank=24), 5)
    same(plain, model)


def test_sgd_with_momentum_is_itself_where_gradients_stay_in_the_subspace():
    """Gradients of rank 3: projecting to 3 directions loses nothing, as SGD does not care for the basis."""
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
    """The same with a new random basis of all but no directions at every step: only rotation keeps the momentum."""

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
    p = one()
    optimizer = lr.LowRankProjection(torch.optim.Adam([p]), rank=4, refresh=1, rotate="both")
    optimizer.step()
    state = optimizer.optimizer.state[optimizer.projected()[0][1]]
    before = state["exp_avg_sq"].clone()
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    optimizer._shadows[p].rotate(state, turn, second=True)
    assert (state["exp_avg_sq"] >= 0).all()
    torch.testing.assert_close(state["exp_avg_sq"].sum(1), before.sum(1))


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


# --- galore-torch -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (has("galore_torch") and has("transformers")), reason="needs galore-torch and transformers")
@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("refresh", [3, 100])
def test_equal_to_galore_torch(refresh, decay, monkeypatch):
    model, other = net(), net()
    for each in (model, other):  # galore-torch takes matrices only
        each[0].weight.requires_grad_(False)
    settings = {"lr": 1e-3, "weight_decay": decay, "eps": 1e-12}
    inner = torch.optim.AdamW(model.parameters(), **settings)
    optimizer = lr.LowRankProjection(inner, rank=4, refresh=refresh, scale=0.25, rotate="none")
    galore = {"rank": 4, "update_proj_gap": refresh, "scale": 0.25, "proj_type": "std"}
    groups = [
        {"params": [p for p in other.parameters() if p.ndim == 1]},
        {"params": [p for p in other.parameters() if p.ndim == 2], **galore},
    ]
    library = peer("galore_torch")
    if refresh < 10:
        # moments are kept from basis to basis, so the signs of singular vectors matter, and each SVD has its own
        def same_signs(self, gradient, rank, type):
            return svd_basis(gradient, rank) if type == "left" else svd_basis(gradient.mT, rank).mT

        monkeypatch.setattr(library.galore_projector.GaLoreProjector, "get_orthogonal_matrix", same_signs)
    train(model, optimizer, 10)
    train(other, library.GaLoreAdamW(groups, no_deprecation_warning=True, **settings), 10)
    # they decay after the step and torch before it: a difference of lr * decay * lr a step
    same(model, other, 1e-6 if decay == 0 else 1e-4)


# --- bases ------------------------------------------------------------------------------------------------------


def test_svd_basis_is_the_leading_singular_vectors():
    matrix = torch.randn(30, 50)
    u = torch.linalg.svd(matrix.double())[0][:, :5]
    basis = svd_basis(matrix, 5).double()
    torch.testing.assert_close(basis @ basis.mT, u @ u.mT, atol=1e-6, rtol=0)


def test_power_iteration_converges_to_the_svd():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(40, 40)).Q, torch.linalg.qr(torch.randn(60, 40)).Q
    matrix = u * 0.8 ** torch.arange(40.0) @ v.mT
    exact = svd_basis(matrix, 6)
    basis = random_basis(matrix, 6, 0)
    errors = []
    for _ in range(12):
        basis = power_basis(matrix, 6, basis, 0)
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
        basis = power_basis(matrix, 6, basis, 0)
        best = (svd_basis(matrix, 6).mT @ matrix).norm()
        assert (basis.mT @ matrix).norm() > 0.9999 * best


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["zero", "rank one", "tiny", "huge"])
def test_bases_are_orthonormal_whatever_the_gradient(method, what):
    torch.manual_seed(0)
    matrix = {
        "zero": torch.zeros(12, 20),
        "rank one": torch.outer(torch.randn(12), torch.randn(20)),
        "tiny": 1e-25 * torch.randn(12, 20),
        "huge": 1e18 * torch.randn(12, 20),
    }[what]
    basis = None
    for _ in range(3):
        basis = fitted(matrix, 4, method, basis, 0)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4), atol=1e-5, rtol=0)
    if what == "rank one" and method != "random":
        torch.testing.assert_close(basis @ (basis.mT @ matrix), matrix, atol=1e-5, rtol=1e-4)


def test_a_zero_gradient_leaves_the_power_basis():
    basis = random_basis(torch.zeros(12, 20), 4, 0)
    assert torch.equal(power_basis(torch.zeros(12, 20), 4, basis, 0), basis)


def test_random_bases_come_from_the_seed_alone():
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


# --- as a torch optimizer ---------------------------------------------------------------------------------------


def test_schedulers_drive_it():
    model = net()
    optimizer = lr.LowRankProjection(torch.optim.AdamW(model.parameters(), lr=1.0), rank=4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    rates = []
    train(model, optimizer, 5, lambda: (rates.append(optimizer.optimizer.param_groups[1]["lr"]), scheduler.step()))
    plain = torch.optim.AdamW(net().parameters(), lr=1.0)
    other = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=0.1, total_steps=10)
    for k, rate in enumerate(rates):
        assert rate == plain.param_groups[0]["lr"], k
        plain.step()
        other.step()


def test_a_rate_of_zero_stops_it():
    model = net()
    optimizer = lr.LowRankProjection(torch.optim.AdamW(model.parameters(), lr=1.0), rank=4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    same(train(model, optimizer, 2), net())


def test_groups_keep_their_settings():
    p, q = one(), one(seed=1)
    before, other = p.detach().clone(), q.detach().clone()
    inner = torch.optim.SGD([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.0}], lr=1.0)
    optimizer = lr.LowRankProjection(inner, rank=4)
    late = one((16, 9), seed=2)
    kept = late.detach().clone()
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    optimizer.step()
    assert not torch.equal(p, before)
    assert torch.equal(q, other)
    basis = optimizer.state_dict()["state"][2]["projector"]
    torch.testing.assert_close(late.detach(), kept - 0.2 * late.grad @ basis @ basis.mT, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == 3


def test_named_parameters():
    model = net()
    optimizer = lr.LowRankProjection(torch.optim.AdamW(model.named_parameters()), rank=4)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    train(model, optimizer, 2)


def test_target_and_min_size_choose():
    model = net()
    for settings, count in (
        ({}, 3),
        ({"target": [model[3].weight]}, 1),
        ({"target": lambda p: p.ndim == 4}, 1),
        ({"min_size": 241}, 1),
        ({"target": []}, 0),
    ):
        optimizer = lr.LowRankProjection(torch.optim.Adam(model.parameters()), rank=4, **settings)
        assert len(optimizer.projected()) == count


def test_closures_and_missing_gradients():
    model, plain = net(), net()
    model[6].requires_grad_(False)
    plain[6].requires_grad_(False)
    x, y = data()
    optimizer = lr.LowRankProjection(torch.optim.SGD(model.parameters(), lr=0.1), rank=4)
    other = lr.LowRankProjection(torch.optim.SGD(plain.parameters(), lr=0.1), rank=4)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert torch.equal(loss, nn.functional.cross_entropy(net()(x), y))
    train(plain, other, 1)
    same(model, plain)
    assert torch.equal(model[6].weight, net()[6].weight)
    optimizer.zero_grad()
    optimizer.step()
    same(model, plain)


def test_between_steps_the_small_parameters_hold_nothing():
    model = net()
    optimizer = train_and_return(model)
    assert all(small.numel() == 0 and small.grad is None for _, small in optimizer.projected())


def train_and_return(model, **settings):
    optimizer = lr.LowRankProjection(torch.optim.AdamW(model.parameters(), lr=1e-2), rank=4, refresh=3, **settings)
    train(model, optimizer, 5)
    return optimizer


def test_state_bytes_counts_everything():
    p = one((64, 32))
    optimizer = lr.LowRankProjection(torch.optim.AdamW([p]), rank=4)
    assert optimizer.state_bytes() == 0
    optimizer.step()
    step = 4
    assert optimizer.state_bytes() == 2 * 64 * 4 * 4 + 32 * 4 * 4 + step
    # no state is a view of something bigger
    for value in optimizer.state_dict()["state"][0].values():
        assert not torch.is_tensor(value) or value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_to_the_bit(name, method):
    def made():
        model = net()
        inner = OPTIMIZERS[name](model.parameters())
        return model, lr.LowRankProjection(inner, rank=4, refresh=3, method=method, rotate="first")

    model, optimizer = made()
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, start=4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, again = made()
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(other, again, 5, start=4)
    same(model, other)


def test_scheduler_settings_are_in_the_state():
    model = net()
    optimizer = train_and_return(model)
    optimizer.param_groups[0]["lr"] = 0.5
    again = lr.LowRankProjection(torch.optim.AdamW(net().parameters()), rank=4)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["lr"] == 0.5


def test_deepcopy_goes_its_own_way():
    model = net()
    optimizer = train_and_return(model)
    other, again = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, start=5)
    train(other, again, 3, start=5)
    same(model, other)


# --- number formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_has_full_precision_state(dtype):
    p = one(dtype=dtype)
    exact = one(dtype=dtype).detach().double()
    gradient = p.grad.double()
    optimizer = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1, momentum=0.9), rank=4)
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    wide = torch.promote_types(dtype, torch.float32)
    assert state["projector"].dtype == state["momentum_buffer"].dtype == wide
    basis = state["projector"].double()
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-12)
    torch.testing.assert_close(
        p.detach().double(), exact - 0.1 * gradient @ basis @ basis.mT, atol=tolerance, rtol=tolerance
    )
    again = lr.LowRankProjection(torch.optim.SGD([one(dtype=dtype)], lr=0.1, momentum=0.9), rank=4)
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["state"][0]["projector"].dtype == wide
    assert again.state_dict()["state"][0]["momentum_buffer"].dtype == wide


@pytest.mark.parametrize("make", [lambda p: p.mT.contiguous().mT, lambda p: p])
def test_any_memory_layout(make):
    p, q = one(), one()
    p.data = make(p.data)
    for each in (p, q):
        lr.LowRankProjection(torch.optim.SGD([each], lr=0.1), rank=4).step()
    torch.testing.assert_close(p, q)


def test_channels_last():
    model, plain = net(), net()
    model = model.to(memory_format=torch.channels_last)
    for each in (model, plain):
        train(each, lr.LowRankProjection(torch.optim.SGD(each.parameters(), lr=0.1), rank=4), 3)
    same(model, plain, 1e-6)


def test_grad_scaler_leaves_out_what_is_not_finite():
    model, plain = net(), net()
    optimizer = lr.LowRankProjection(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), rank=4, refresh=2)
    other = lr.LowRankProjection(torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True), rank=4, refresh=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(4):
        x, y = data(k)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if k == 1:
            model[3].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if k != 1:
            train(plain, other, 1, start=k)
    same(model, plain, 1e-6)


@pytest.mark.parametrize("method", ["svd", "power"])
def test_a_gradient_that_is_not_finite_fits_no_projector(method):
    p = one()
    optimizer = lr.LowRankProjection(torch.optim.SGD([p], lr=0.0), rank=4, refresh=1, method=method)
    optimizer.step()
    before = optimizer.state_dict()["state"][0]["projector"].clone()
    good = p.grad.clone()
    p.grad[0, 0] = math.nan
    optimizer.step()
    assert torch.equal(optimizer.state_dict()["state"][0]["projector"], before)
    p.grad = good.roll(1, 0) + torch.randn(20, 12)
    optimizer.step()
    after = optimizer.state_dict()["state"][0]["projector"]
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_a_first_gradient_that_is_not_finite():
    p = one()
    good = p.grad.clone()
    p.grad[0, 0] = math.nan
    optimizer = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1), rank=4, refresh=100)
    optimizer.step()
    p.grad = good
    optimizer.step()
    basis = optimizer.state_dict()["state"][0]["projector"]
    torch.testing.assert_close(basis @ basis.mT, (e := svd_basis(good.mT, 4)) @ e.mT, atol=1e-6, rtol=0)


# --- rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", RULES, ids=lambda row: row.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (6, 4, 3, 3)])
def test_a_rule_means_the_rank_that_it_finds_in_the_first_gradient(row, method, shape):
    first, second = one(shape), one(shape)
    first.grad = second.grad = one(shape, seed=3).grad * 0.7 ** torch.arange(shape[-1])
    rank = row.rule(spectrum(first.grad.flatten(1)))
    steps = []
    for p, given in ((first, row.rule), (second, rank)):
        optimizer = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1), given, method=method)
        before = p.detach().clone()
        optimizer.step()
        steps.append(p.detach() - before)
    assert torch.linalg.matrix_rank(steps[0].flatten(1)) == rank
    torch.testing.assert_close(steps[0], steps[1])


def test_parameter_fraction_is_that_of_a_pair():
    p = one((30, 50))
    optimizer = lr.LowRankProjection(torch.optim.Adam([p]), lr.ParameterFraction(0.25))
    optimizer.step()
    rank = int(0.25 * 30 * 50 / 80)
    assert optimizer.state_dict()["state"][0]["projector"].shape == (30, rank)
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (rank, 50)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adafactor"])
def test_a_rule_goes_on_to_the_bit_from_a_file(name):
    whole, half, other = net(), net(), net()
    rule = lr.Energy(0.8)

    def made(model):
        return lr.LowRankProjection(OPTIMIZERS[name](model.parameters()), rule, refresh=3)

    train(whole, made(whole), 8)
    optimizer = made(half)
    train(half, optimizer, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(half.state_dict())
    again = made(other)
    train(net(), made(net()), 1)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(other, again, 4, start=4)
    same(whole, other)
    with pytest.raises(lr.LowRankError, match="load_state_dict: got a projector"):
        lr.LowRankProjection(OPTIMIZERS[name](net().parameters()), 7).load_state_dict(again.state_dict())


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_rule_waits_for_a_gradient_that_says_something(bad):
    p, late = one(), one()
    late.grad = p.grad.clone()
    good, p.grad = p.grad, torch.full_like(p, bad)
    optimizers = [
        lr.LowRankProjection(torch.optim.AdamW([q], lr=0.1, weight_decay=0.1), lr.Energy(0.6)) for q in (p, late)
    ]
    optimizers[0].step()
    torch.testing.assert_close(p, 0.99 * late)  # it decays, as a parameter with a gradient of zeros does
    late.data.copy_(p.data)
    p.grad = good
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(p, late)


# --- refusals ---------------------------------------------------------------------------------------------------


def stepped():
    p = one()
    optimizer = torch.optim.Adam([p])
    optimizer.step()
    return optimizer


def scheduled():
    optimizer = torch.optim.Adam([one()])
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return optimizer


class Foreign(torch.optim.SGD.__base__):
    def __init__(self, params, weight_decay):
        super().__init__(params, {"lr": 0.1, "weight_decay": weight_decay})


def adam():
    return torch.optim.Adam([one()])


BAD = {
    "a class": (lambda: lr.LowRankProjection(torch.optim.Adam, 4), "call it with the parameters"),
    "a model": (lambda: lr.LowRankProjection(net(), 4), "expected a torch.optim.Optimizer"),
    "LBFGS": (lambda: lr.LowRankProjection(torch.optim.LBFGS([one()]), 4), "LBFGS"),
    "ASGD": (lambda: lr.LowRankProjection(torch.optim.ASGD([one()]), 4), "averages"),
    "Adagrad": (lambda: lr.LowRankProjection(torch.optim.Adagrad([one()]), 4), "another optimizer"),
    "SparseAdam": (lambda: lr.LowRankProjection(torch.optim.SparseAdam([one()]), 4), "sparse"),
    "twice": (lambda: lr.LowRankProjection(lr.LowRankProjection(adam(), 4), 4), "project once"),
    "begun": (lambda: lr.LowRankProjection(stepped(), 4), "give a new one"),
    "scheduled": (lambda: lr.LowRankProjection(scheduled(), 4), "make the scheduler for the projection"),
    "rank 0": (lambda: lr.LowRankProjection(adam(), 0), "rank 0, expected"),
    "rank 0.5": (lambda: lr.LowRankProjection(adam(), 0.5), "ParameterFraction(0.5)"),
    "rank True": (lambda: lr.LowRankProjection(adam(), True), "rank True, expected"),
    "refresh 0": (lambda: lr.LowRankProjection(adam(), 4, refresh=0), "refresh=0"),
    "min_size": (lambda: lr.LowRankProjection(adam(), 4, min_size=-1), "min_size=-1"),
    "seed": (lambda: lr.LowRankProjection(adam(), 4, seed=None), "seed=None"),
    "method": (lambda: lr.LowRankProjection(adam(), 4, method="qr"), "svd, random, power"),
    "rotate": (lambda: lr.LowRankProjection(adam(), 4, rotate=True), "none, first, both"),
    "scale 0": (lambda: lr.LowRankProjection(adam(), 4, scale=0), "scale=0"),
    "scale NaN": (lambda: lr.LowRankProjection(adam(), 4, scale=math.nan), "scale=nan"),
    "target name": (lambda: lr.LowRankProjection(adam(), 4, target="weight"), "named_parameters"),
    "target names": (lambda: lr.LowRankProjection(adam(), 4, target=["weight"]), "named_parameters"),
    "target tensor": (lambda: lr.LowRankProjection(adam(), 4, target=one()), "named_parameters"),
    "decoupled": (lambda: lr.LowRankProjection(adam(), 4, decoupled="yes"), "decoupled='yes'"),
    "foreign": (lambda: lr.LowRankProjection(Foreign([one()], 0.1), 4), "decoupled=True"),
    "lazy": (lambda: lr.LowRankProjection(torch.optim.SGD(nn.LazyLinear(3).parameters()), 4), "run the model once"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case):
    call, text = BAD[case]
    with pytest.raises(lr.LowRankError) as caught:
        call()
    assert text in str(caught.value)


def test_a_refusal_leaves_the_optimizer():
    inner = Foreign([one()], 0.1)
    with pytest.raises(lr.LowRankError):
        lr.LowRankProjection(inner, 4)
    assert inner.param_groups[0]["params"][0].numel() == 240
    assert lr.LowRankProjection(inner, 4, decoupled=True).projected()


def test_sparse_gradients_are_refused_before_anything_changes():
    table = nn.Embedding(20, 12, sparse=True)
    other = one()
    before = other.detach().clone()
    optimizer = lr.LowRankProjection(torch.optim.SGD([other, table.weight], lr=0.1), rank=4)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(lr.LowRankError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(other, before)


def test_exchanged_parameters_are_refused():
    model = net()
    optimizer = train_and_return(model)
    optimizer.param_groups[0]["params"][0] = one()
    with pytest.raises(lr.LowRankError, match="exchanged"):
        optimizer.step()


@pytest.mark.parametrize("wrong", ["rank", "groups", "plain"])
def test_foreign_states_are_refused(wrong):
    model = net()
    saved = train_and_return(model).state_dict()
    if wrong == "plain":
        plain = torch.optim.AdamW(model.parameters())
        train(model, plain, 1)
        saved = plain.state_dict()
    parameters = list(net().parameters())
    inner = torch.optim.AdamW(parameters[1:] if wrong == "groups" else parameters)
    optimizer = lr.LowRankProjection(inner, rank=5 if wrong == "rank" else 4)
    with pytest.raises(lr.LowRankError, match="load_state_dict: got"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_bytes() == 0


# --- two processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_have_the_same_weights(method, tmp_path):
    first, second = run_processes(worker.run, tmp_path, method)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_the_hooks_factors_are_the_projectors(tmp_path):
    first, second = run_processes(worker.run_shared, tmp_path)
    for hook_rank, got in first.items():
        assert torch.equal(got["weights"], second[hook_rank]["weights"])
        assert got["orthonormal"] < 1e-5
        assert got["fits"] == [worker.STEPS // 2] * 2
        assert got["losses"][-1] < 0.9 * got["losses"][0]
        # all that the hook sends is in the projection, where its rank is not above the projection's
        assert max(got["lost"]) < 1e-5


def test_factors_give_the_leading_directions_of_their_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    basis = factors_basis(left, right, 4, None, 0)
    exact = torch.linalg.svd(left @ right.mT).U[:, :4]
    torch.testing.assert_close(basis @ basis.mT, exact @ exact.mT, rtol=1e-4, atol=1e-5)


def test_factors_of_a_lower_rank_leave_directions_of_before():
    generator = torch.Generator().manual_seed(0)
    before = torch.linalg.qr(torch.randn(20, 4, generator=generator)).Q
    left, right = torch.randn(20, 1, generator=generator), torch.randn(50, 1, generator=generator)
    basis = factors_basis(left, right, 4, before, 0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4), rtol=0, atol=1e-5)
    span = torch.linalg.qr(torch.cat([left, before[:, :3]], 1)).Q
    torch.testing.assert_close(basis @ basis.mT, span @ span.mT, rtol=0, atol=1e-5)


def test_a_comm_state_is_one():
    with pytest.raises(lr.LowRankError, match="got comm_state int"):
        lr.LowRankProjection(torch.optim.SGD(net().parameters(), lr=0.1), rank=2, comm_state=3)
