"""Half precision, memory layouts, and gradients that are not finite."""

import math

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .common import data, net, one, same, train


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
    right = torch.linalg.svd(good).Vh[:4]
    torch.testing.assert_close(basis @ basis.mT, right.mT @ right, atol=1e-6, rtol=0)
