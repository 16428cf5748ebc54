"""A projection is a torch optimizer: schedulers, groups, names, closures, targets."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .common import data, net, one, same, train, train_and_return


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
