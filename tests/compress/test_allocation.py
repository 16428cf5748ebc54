"""The least loss under the budget: idle layers get nothing, CP is chosen where it is worth its time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr


class Branched(nn.Module):
    """A body, and a branch of which the loss knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 5)
        self.aux, self.far = nn.Linear(48, 64), nn.Linear(64, 40)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.body(x))
        return self.head(torch.relu(self.mid(x))), self.far(torch.relu(self.aux(x)))


def first_output(output: tuple[torch.Tensor, torch.Tensor], _: object = None) -> torch.Tensor:
    return lr.SampledCrossEntropy()(output[0])


@pytest.fixture
def data() -> list[torch.Tensor]:
    return [torch.randn(200, 32) @ torch.randn(32, 32)]


@pytest.mark.parametrize("units", ["absolute", "balanced", "relative"])
@pytest.mark.parametrize("budget", [lr.Budget(params=0.4), lr.Budget(macs=0.4), lr.Budget(bytes=0.4)])
def test_a_branch_without_effect_on_the_loss_gets_the_smallest_rank(data, units, budget):
    model = Branched()
    stats = lr.calibrate(model, data, loss=first_output)
    plan = lr.make_plan(model, budget, stats=stats, units=units)
    assert {name: plan[name].rank for name in ("aux", "far")} == {"aux": 1, "far": 1}
    # what the branch leaves is spent where the loss is
    alone = nn.Sequential(model.body, nn.ReLU(), model.mid, nn.ReLU(), model.head)
    own = lr.calibrate(alone, data, loss=lr.SampledCrossEntropy())
    kept = sum(getattr(plan[name].after, *budget.units) for name in ("aux", "far"))
    (unit,) = budget.units
    rest = lr.Budget(**{unit: budget.limits(plan.total)[unit] - kept})
    expected = lr.make_plan(alone, rest, stats=own, units=units)
    assert [(plan[n].method, plan[n].rank) for n in ("body", "mid", "head")] == [(e.method, e.rank) for e in expected]


def test_the_plan_says_so_and_an_edit_takes_the_line_away(data, tmp_path):
    model = Branched()
    plan = lr.make_plan(model, lr.Budget(params=0.4), stats=lr.calibrate(model, data, loss=first_output))
    line = "aux: smallest rank, since no gradient of the loss reaches it"
    assert line in str(plan)
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json") == plan
    assert line not in str(plan.set_rank("aux", 8))
    assert "far: smallest rank" in str(plan)
    assert "far: smallest rank" not in str(plan.drop("far"))


def test_a_gradient_of_zero_is_none(data):
    """A branch that enters the loss with the factor 0 is one that does not enter it."""
    model = Branched()
    stats = lr.calibrate(model, data, loss=lambda y, _: first_output(y) + 0 * y[1].sum())
    assert stats["aux"].gradients is not None
    plan = lr.make_plan(model, lr.Budget(params=0.4), stats=stats)
    assert plan.notes.keys() == {"aux", "far"}
    lr.factorize_(model, plan, stats=stats, data=data)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_without_a_loss_no_layer_is_without_effect(data):
    model = Branched()
    plan = lr.make_plan(model, lr.Budget(params=0.4), stats=lr.calibrate(model, data))
    assert plan.notes == {}


class Recomputed(Branched):
    """Its body's first pass is without gradients, the second with them."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.requires_grad_() if torch.is_grad_enabled() else x
        x = torch.relu(checkpoint(self.body, x, use_reentrant=True))
        return self.head(torch.relu(self.mid(x))), self.far(torch.relu(self.aux(x)))


def test_recomputed_layers_are_traced(data):
    stats = lr.calibrate(Recomputed(), data, loss=first_output)
    assert stats["body"].gradients is not None
    assert all(each.traced for each in stats.values())


@pytest.mark.parametrize("unit", ["params", "macs", "bytes"])
def test_a_budget_of_the_planned_layers_counts_these_only(unit):
    model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16))
    stats = lr.calibrate(model, [torch.randint(0, 100, (8, 5))])
    plan = lr.make_plan(model, lr.Budget(**{unit: 0.5}, of="planned"), stats=stats, skip=["0"])
    before = sum(getattr(entry.before, unit) for entry in plan)
    after = sum(getattr(entry.after, unit) for entry in plan)
    assert 0.4 * before < after <= 0.5 * before
    with pytest.raises(lr.BudgetError, match="the smallest the planned layers can become"):
        lr.make_plan(model, lr.Budget(**{unit: 10}, of="planned"), stats=stats, skip=["0"])


@pytest.fixture(scope="module")
def convolutional() -> tuple[nn.Module, lr.Statistics]:
    """Kernels that are sums of few separable ones and a little more, which CP describes best."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
    model += nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.Flatten(), nn.Linear(12 * 64, 10))
    with torch.no_grad():
        for k in (0, 2, 4):
            factors = [torch.randn(n, 12) for n in model[k].weight.shape]
            exact = torch.einsum("or,ir,hr,wr->oihw", *factors)
            model[k].weight.copy_((exact / exact.std() + 0.1 * torch.randn_like(exact)) / 10)
    return model, lr.calibrate(model, [torch.randn(60, 3, 8, 8)], loss=lr.SampledCrossEntropy())


FAST = [method for method in lr.METHODS.values() if method.name != "cp"]


@pytest.mark.parametrize(
    "budget", [lr.Budget(params=p, of="planned") for p in (0.95, 0.6, 0.3, 0.15)] + [lr.Budget(macs=0.4)], ids=repr
)
def test_cp_by_default_only_where_it_is_worth_its_time(convolutional, budget):
    model, stats = convolutional
    default = lr.make_plan(model, budget, stats=stats)
    every = lr.make_plan(model, budget, stats=stats, methods=list(lr.METHODS.values()))
    without = lr.make_plan(model, budget, stats=stats, methods=FAST)
    lost = sum(entry.error**2 for entry in without) / len(without)
    slower = every.time_ratio > 1 and any(entry.method == "cp" for entry in every)
    assert list(default) == list(without if slower and ("macs" in budget.units or lost <= 0.01) else every)


def test_both_cases_of_the_default_occur(convolutional):
    model, stats = convolutional
    uses = [
        any(entry.method == "cp" for entry in lr.make_plan(model, budget, stats=stats))
        for budget in (lr.Budget(macs=0.4), lr.Budget(params=0.2, of="planned"))
    ]
    assert uses == [False, True]
