"""Stages meet their budgets, carry the moments and the data on, and end where the tolerated loss does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_layers as lr

from ..recovery.digits import accuracy, batches, cnn, mlp, trained


def sizes(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_an_mlp_of_digits_is_made_smaller_until_it_is_no_longer_good_enough():
    model = trained(mlp())
    dense = copy.deepcopy(model)
    held_out = batches(1200, 1797)
    history = lr.progressive_(
        model,
        [0.5, 0.3, 0.1, 0.05],
        lr.RecoverySettings(30, lr=3e-3),
        data=batches(0, 1200),
        loss=F.cross_entropy,
        teacher=dense,
        validation=held_out,
        metric=accuracy,
        tolerated=0.05,
    )
    assert 2 <= history.kept == len(history.stages) - 1
    assert history.score - history.stages[-1].score > 0.05
    assert all(history.score - stage.score <= 0.05 for stage in history.stages[:-1])
    for stage in history.stages:
        assert stage.params <= stage.budget.params * history.params
        assert stage.score >= stage.factorized_score
    kept = history.stages[history.kept - 1]
    assert sizes(model) == kept.params
    with torch.no_grad():
        right = sum(len(y) * accuracy(model(x), y) for x, y in held_out) / 597
    assert right == pytest.approx(kept.score, abs=1e-9)
    lines = str(history).splitlines()
    assert len(lines) == 2 + len(history.stages)
    assert [line.endswith("the model") for line in lines[1:]] == [k == history.kept for k in range(len(lines) - 1)]


def test_a_model_whose_first_stage_fails_is_as_it_was():
    model = trained(cnn())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = list(model.modules())
    told = {"data": batches(0, 300), "validation": batches(1200, 1797), "metric": accuracy}
    history = lr.progressive_(model, [0.1], 1, tolerated=0.0, **told)
    assert history.kept == 0
    assert list(model.modules()) == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_factored_layer_is_truncated_and_one_that_would_not_shrink_stays():
    torch.manual_seed(0)
    model = nn.Sequential(lr.LowRankLinear(32, 32, rank=12), nn.Tanh(), lr.LowRankLinear(32, 32, rank=1), nn.Tanh())
    before = [p.detach().clone() for p in model[2].parameters()]
    data = [torch.randn(16, 32) for _ in range(3)]
    frozen = model[2].requires_grad_(False)
    # 32 of 2112: the second layer needs 96 and the first gets the rest
    history = lr.progressive_(
        model,
        [lr.Budget(params=700)],
        2,
        data=data,
        teacher=copy.deepcopy(model),
        distance="mse",
        methods=[lr.SVDMethod()],
    )
    assert sizes(model) == history.stages[0].params <= 700
    assert 1 < model[0].rank < 12
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True))


def test_budgets_of_macs_and_of_planned_layers_are_fractions_of_the_dense_model():
    dense = trained(cnn(), steps=5)
    stats = lr.calibrate(dense, [x for x, _ in batches(0, 100)])
    total = lr.make_plan(dense, lr.Budget(macs=0.5), stats).total.macs
    model = copy.deepcopy(dense)
    budgets = [lr.Budget(macs=0.5), lr.Budget(macs=0.3)]
    history = lr.progressive_(model, budgets, 2, data=batches(0, 300), methods=[lr.SVDMethod()])
    cost = lr.evaluate(model, batches(0, 100)).macs
    assert history.stages[1].budget == budgets[1]
    assert cost <= 0.3 * total * (1 + 1e-9)
    model = copy.deepcopy(dense)
    lr.progressive_(model, [lr.Budget(params=0.6, of="planned")] * 2, 2, data=batches(0, 300))
    others = sum(p.numel() for m in dense.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sizes(model) <= 0.6 * (sizes(dense) - others) + others


def test_the_data_goes_on_and_the_moments_with_it(monkeypatch):
    """Two stages of one size are one training, but for the learning rate, which is constant here."""
    monkeypatch.setattr(lr.RecoverySettings, "lr_factor", lambda self, step: 1.0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    once = copy.deepcopy(model)
    rows = torch.utils.data.TensorDataset(torch.randn(60, 12).double(), torch.arange(60) % 3)
    data = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator())
    told = {"data": data, "methods": [lr.SVDMethod()], "samples": 12, "lr": 0.01}
    twice = lr.progressive_(model, [0.7, 0.7], 5, **told)
    whole = lr.progressive_(once, [0.7], 10, **told)
    losses = [loss for stage in twice.stages for loss in stage.recovery.losses]
    assert losses == pytest.approx(whole.stages[0].recovery.losses, rel=1e-9)


def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sum() * math.nan


BAD = {
    "got budgets=0.3, expected a list such as": lambda m, d: lr.progressive_(m, 0.3, data=d),
    "got budgets=\\[\\], expected": lambda m, d: lr.progressive_(m, [], data=d),
    "got params=2.0, expected a fraction": lambda m, d: lr.progressive_(m, [2.0], data=d),
    "got 1 settings for 2 budgets": lambda m, d: lr.progressive_(m, [0.5, 0.3], [lr.RecoverySettings(2)], data=d),
    "got tolerated=-1, expected": lambda m, d: lr.progressive_(m, [0.5], tolerated=-1, validation=d, data=d),
    "got tolerated=nan": lambda m, d: lr.progressive_(m, [0.5], tolerated=math.nan, validation=d, data=d),
    "tolerated= and nothing to score": lambda m, d: lr.progressive_(m, [0.5], tolerated=1.0, data=d),
    "got samples=0": lambda m, d: lr.progressive_(m, [0.5], samples=0, data=d),
    "got step=, which is no option": lambda m, d: lr.progressive_(m, [0.5], step=3, data=d),
    "can be read only once": lambda m, d: lr.progressive_(m, [0.5], data=iter(d)),
    "metric= without validation": lambda m, d: lr.progressive_(m, [0.5], metric=accuracy, data=d),
    "means 4 params, but the smallest": lambda m, d: lr.progressive_(m, [0.9, lr.Budget(params=4)], 2, data=d),
    "objective of step 1 is nan": lambda m, d: lr.progressive_(
        m,
        [0.9],
        2,
        loss=lambda output, target: output.sum() * (1 if output.is_leaf else math.nan),
        data=d,
        curvature=None,
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_and_the_model_is_as_it_was(message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [(torch.randn(4, 6), torch.arange(4) % 3) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lr.LowRankError, match=message):
        BAD[message](model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model[0]) is nn.Linear
