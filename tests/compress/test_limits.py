"""Several limits in one plan, and the least cost within a growth of the loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_layers as lr


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list, lr.Statistics]:
    """A classifier of vectors whose hidden layers differ in parameters per MAC, and its statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    model += nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    x = torch.randn(300, 2, 8, 8)
    y = (x.flatten(1) @ torch.randn(128, 5)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), [x], lr.calibrate(model, [x], loss=lr.SampledCrossEntropy(temperature=1.0))


@pytest.mark.parametrize(
    "limits",
    [
        {"params": 0.5, "macs": 0.5},
        {"params": 0.6, "macs": 0.3},
        {"params": 0.3, "macs": 0.6},
        {"bytes": 12_000, "macs": 0.4, "params": 0.9},
    ],
    ids=str,
)
def test_every_limit_holds_and_one_of_them_is_used(trained, limits):
    model, _, stats = trained
    budget = lr.Budget(**limits)
    plan = lr.make_plan(model, budget, stats=stats)
    used = {unit: getattr(plan.after, unit) / limit for unit, limit in budget.limits(plan.total).items()}
    assert all(part <= 1 for part in used.values())
    assert max(used.values()) > 0.95
    assert all(entry.after.params <= entry.before.params for entry in plan)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    assert sum(p.numel() for p in small.parameters()) == plan.after.params


def test_one_limit_that_binds_gives_the_plan_of_that_limit(trained):
    model, _, stats = trained
    alone = lr.make_plan(model, lr.Budget(params=0.4), stats=stats)
    wide = lr.make_plan(model, lr.Budget(params=0.4, macs=1.0), stats=stats)
    assert list(alone) == list(wide)


@pytest.mark.parametrize("limit", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("unit", ["params", "macs"])
def test_the_least_cost_within_a_growth_of_the_loss(trained, limit, unit):
    model, _, stats = trained
    budget = lr.Budget(loss=limit, **({} if unit == "params" else {unit: 1.0}))
    plan = lr.make_plan(model, budget, stats=stats)
    assert plan.loss <= limit
    # under the cost that was found, the least loss in the same units is the limit's plan or one as cheap
    again = lr.make_plan(model, lr.Budget(**{unit: getattr(plan.after, unit)}), stats=stats, units="absolute")
    assert again.loss <= plan.loss
    # one unit of cost less, and the loss is above the limit
    less = lr.make_plan(model, lr.Budget(**{unit: getattr(plan.after, unit) - 1}), stats=stats, units="absolute")
    assert less.loss > limit


def test_the_predicted_growth_is_that_of_the_loss_of_small_changes(trained):
    """The model's own distribution is the truth here, so that its cross-entropy grows by a divergence, as predicted."""
    model, (x,), stats = trained
    plan = lr.make_plan(model, lr.Budget(loss=0.02), stats=stats)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    with torch.no_grad():
        grown = F.kl_div(small(x).log_softmax(1), model(x).log_softmax(1), log_target=True, reduction="batchmean")
    assert 0.25 * plan.loss < grown < 2.5 * plan.loss


def test_a_loss_and_a_cost_together(trained):
    model, _, stats = trained
    plan = lr.make_plan(model, lr.Budget(loss=0.2, params=0.9, macs=0.8), stats=stats)
    assert plan.loss <= 0.2
    assert plan.after.macs <= 0.8 * plan.total.macs
    assert plan.after.params <= 0.9 * plan.total.params
    with pytest.raises(lr.BudgetError, match="no choice was found that meets all"):
        lr.make_plan(model, lr.Budget(loss=1e-6, params=0.3), stats=stats)


def test_the_plan_prints_what_it_has_of_each_limit(trained, tmp_path):
    model, _, stats = trained
    plan = lr.make_plan(model, lr.Budget(params=0.5, loss=0.5), stats=stats)
    limit = int(0.5 * plan.total.params)
    line = f"limits: {plan.after.params:,} params of at most {limit:,} params; loss {plan.loss:.3g} of at most loss 0.5"
    assert line in str(plan)
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json") == plan
    assert lr.Plan.load(tmp_path / "plan.json").achieved() == plan.achieved()
    plan.set_rank("6", 3)
    assert plan.loss is None
    assert "unknown of at most loss 0.5" in str(plan)
    plan.drop("6")
    assert plan.loss is not None


def test_limits_on_what_is_not_known_are_refused(trained):
    model, batches, _ = trained
    with pytest.raises(lr.BudgetError, match="needs gradients of a loss"):
        lr.make_plan(model, lr.Budget(loss=0.1))
    with pytest.raises(lr.BudgetError, match="needs gradients of a loss"):
        lr.make_plan(model, lr.Budget(loss=0.1), stats=lr.calibrate(model, batches))
    with pytest.raises(lr.BudgetError, match="needs to know the sizes"):
        lr.make_plan(model, lr.Budget(macs=0.5, params=0.5))
    with pytest.raises(lr.BudgetError, match="expected one limit"):
        lr.make_plan(model, lr.Budget(params=0.5, bytes=0.5), allocation="alds")
    with pytest.raises(lr.BudgetError, match="expected one limit"):
        lr.plan_by_validation(model, lr.Budget(params=0.5, bytes=0.5), lambda _: 0.0)
