"""The forecast is that of the plan, and of the weights' stable ranks."""

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_layers as lr


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0]).mean(1)


def test_numbers():
    model, budget = WithAttention(), lr.Budget(params=0.6)
    stats = lr.calibrate(model, [torch.randn(40, 5, 16)], loss=lr.SampledCrossEntropy())
    found = lr.forecast(model, budget, stats)
    plan = lr.make_plan(model, budget, stats)
    assert found.plan == plan
    assert found.loss == plan.loss > 0
    removed = 1 - sum(entry.after.params for entry in plan) / sum(entry.before.params for entry in plan)
    weights = [*model.attention.in_proj_weight.chunk(3), model.attention.out_proj.weight, model.out.weight]
    ranks = [np.linalg.norm(w) ** 2 / np.linalg.norm(w, 2) ** 2 for w in (w.detach().double().numpy() for w in weights)]
    assert len(plan) == len(ranks)
    assert found.removed == pytest.approx(removed)
    assert found.stable_rank == pytest.approx(np.mean(ranks), rel=1e-5)
    assert found.ratio_times_stable_rank == pytest.approx(removed * np.mean(ranks), rel=1e-5)


def test_skipped_layers_do_not_count():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Embedding(5, 40))
    found = lr.forecast(model, lr.Budget(params=0.4, of="planned"), skip=["0", "2"], methods=[lr.SVDMethod()])
    assert [entry.name for entry in found.plan] == ["1"]
    assert found.stable_rank == pytest.approx(lr.weight_spectrum(model)["1"].raw.stable_rank)
    assert found.loss is None
    assert "not known" in str(found)


def test_loss_is_not_known_without_gradients():
    model = nn.Sequential(nn.Linear(40, 40))
    stats = lr.calibrate(model, [torch.randn(90, 40)])
    assert lr.forecast(model, lr.Budget(params=0.5), stats).loss is None


def test_refuses_what_cannot_be_planned():
    with pytest.raises(lr.BudgetError):
        lr.forecast(nn.Sequential(nn.Linear(40, 40)), lr.Budget(params=1))
