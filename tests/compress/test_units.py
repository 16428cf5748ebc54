"""Layers are compared only where their estimates have one unit."""

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
    kept = sum(getattr(plan[name].after, budget.unit) for name in ("aux", "far"))
    rest = lr.Budget(**{budget.unit: budget.limit(plan.total) - kept})
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


class Routed(nn.Module):
    """Two experts; every row goes to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, (x, x[:0]), strict=True)])


@pytest.mark.parametrize("loss", [None, lr.SampledCrossEntropy()])
def test_an_expert_that_saw_no_rows_stays_dense(loss):
    """Its moments are zero, which is no knowledge of what it costs to cut it."""
    model = Routed()
    stats = lr.calibrate(model, [torch.randn(50, 16)], loss=loss)
    plan = lr.make_plan(model, lr.Budget(params=0.8), stats=stats)
    assert plan.skipped == {"experts.1": "calibration never reached it"}


class FixedFeatures(nn.Module):
    """A backbone without gradients, on which everything depends."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = torch.relu(self.backbone(x))
        return self.head(torch.relu(self.neck(x)))


@pytest.mark.parametrize("trainable", [False, True])
def test_what_ran_without_gradients_is_no_layer_without_effect(trainable):
    model = FixedFeatures().requires_grad_(trainable)
    stats = lr.calibrate(model, [torch.randn(50, 16)], loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(params=0.7), stats=stats)
    assert plan.skipped.keys() == {"backbone"}
    assert "its effect on the loss is not known" in plan.skipped["backbone"]
    assert plan.notes == {}
    # without a loss all three are known equally well
    assert len(lr.make_plan(model, lr.Budget(params=0.7), stats=lr.calibrate(model, [torch.randn(50, 16)]))) == 3


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


class Holder(nn.Module):
    """As a vision transformer: parameters of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.scale = nn.Parameter(torch.ones(16))
        self.inner = nn.ModuleDict({"fc": nn.Linear(16, 16)})
        self.inner.register_parameter("position", nn.Parameter(torch.randn(4, 16)))


def test_parameters_that_a_model_holds_itself_are_listed_by_their_names():
    plan = lr.make_plan(Holder(), rank=2)
    assert plan.skipped == {
        "class_token": "a parameter of Holder itself, which no layer holds",
        "inner.position": "a parameter of ModuleDict itself, which no layer holds",
    }
    with pytest.raises(lr.LowRankError, match="'class_token'; it was skipped: a parameter of Holder"):
        plan["class_token"]


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


def test_a_budget_of_something_else_is_refused():
    with pytest.raises(lr.BudgetError, match="of='encoder', expected 'model' or 'planned'"):
        lr.Budget(params=0.5, of="encoder")


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_where_it_is_asked_for(progress, capsys):
    lr.make_plan(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), lr.Budget(params=0.5), progress=progress)
    assert ("2/2" in capsys.readouterr().err) is progress
