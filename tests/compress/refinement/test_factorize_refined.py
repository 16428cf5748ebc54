"""``factorize_(refine=)`` is a factorization in sequence and a refinement, or nothing at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

SETTINGS = lr.RefinementSettings(epochs=3, lr=3e-3, held_out=4, distance="mse")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)]
    return nn.Sequential(nn.Linear(8, 16), *layers).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*blocks).eval()


CASES = {"encoder": (encoder, (8, 6, 8)), "convolutions": (convolutions, (8, 8, 6, 6))}


@pytest.fixture(params=CASES)
def case(request):
    make, shape = CASES[request.param]
    model, data = make(), list(torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)))
    stats = lr.calibrate(model, data)
    return model, lr.make_plan(model, lr.Budget(params=0.5), stats=stats), stats, data


def test_it_is_one_after_the_other(case):
    model, plan, stats, data = case
    dense = copy.deepcopy(model)
    expected = lr.factorize_(copy.deepcopy(model), plan, stats=stats, data=data)
    in_sequence = {name: parameter.clone() for name, parameter in expected.named_parameters()}
    lr.refine_(expected, dense, data, SETTINGS)
    assert any(not torch.equal(x, in_sequence[name]) for name, x in expected.named_parameters()), "it was refined"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert lr.factorize_(model, plan, stats=stats, data=data, optimizer=optimizer, refine=SETTINGS) is model
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("wrong", ["no data", "a single batch", "no epochs", "NaN"])
def test_an_error_changes_nothing(case, wrong):
    model, plan, stats, data = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given, refine = {
        "no data": (None, SETTINGS),
        "a single batch": (data[:1], SETTINGS),
        "no epochs": (data, 0),
        "NaN": ([*data[:-1], data[-1] * float("nan")], SETTINGS),
    }[wrong]
    with pytest.raises(lr.LowRankError):
        lr.factorize_(model, plan, stats=stats, data=given, refine=refine)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(isinstance(module, lr.FactoredModule) for module in model.modules())
