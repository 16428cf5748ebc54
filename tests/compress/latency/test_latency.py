"""Plans by measured latency, under a clock that counts: a linear layer takes a fixed time and one per weight."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.compress.latency import fit, store, table
from lowrank_layers.compress.latency.fit import Trial, gain_at, time_ratio
from lowrank_layers.compress.latency.run import ExampleRun

CALL = 500
"""Time of a call, in weights."""
TICK = 2**-30
"""Seconds of a weight: a power of two, so that sums are exact."""


class Clock:
    """Seconds that pass while linear layers run, and how often each shape ran."""

    def __init__(self) -> None:
        self.now, self.calls, self.extra = 0.0, 0, 0.0

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        self.now += (CALL + layer.weight.numel()) * TICK
        self.calls += 1
        return F.linear(x, layer.weight, layer.bias)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store.TimeStore, "_known", {})
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, input: clock.linear(layer, input))
    monkeypatch.setattr(time, "thread_time", lambda: clock.now)
    return clock


class Net(nn.Module):
    """A wide layer and a narrow one, whose calls take longer than its products, twice each."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)]), nn.Linear(64, 5)
        self.narrow = nn.ModuleList([nn.Linear(64, 8), nn.Linear(8, 64)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.wide, *self.narrow):
            x = torch.relu(layer(x)) + 0.1
        return self.last(x)


def seconds(model: nn.Module) -> float:
    """What the clock says of a forward pass."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return TICK * sum(CALL + layer.weight.numel() for layer in layers)


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(100, 64) @ torch.randn(64, 64)]


@pytest.fixture
def stats(batches):
    torch.manual_seed(1)
    return lr.calibrate(Net(), batches, loss=lr.SampledCrossEntropy())


def planned(budget, stats, **settings):
    torch.manual_seed(1)
    model = Net()
    return model, lr.make_plan(model, budget, stats=stats, **settings)


@pytest.mark.parametrize("fraction", [0.9, 0.7])
def test_what_is_predicted_is_measured_and_true(clock, stats, fraction):
    model, plan = planned(lr.Budget(latency=fraction), stats, round_to=1)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    assert plan.total.latency == pytest.approx(seconds(model))
    assert plan.after.latency == pytest.approx(seconds(small))
    assert plan.settings["measured"] == pytest.approx(seconds(small))
    # one more rank of a wide layer would be above the limit
    limit = fraction * plan.total.latency
    assert limit - 128 * TICK < plan.after.latency <= limit
    before, after = seconds(model), seconds(small)
    line = f"latency: dense {1e3 * before:.3g} ms, predicted {1e3 * after:.3g} ms ({after / before:.1%})"
    assert line in str(plan)


def test_a_layer_is_replaced_only_where_that_is_faster(clock, stats):
    _, plan = planned(lr.Budget(latency=0.7), stats)
    assert all(entry.after.latency < entry.before.latency for entry in plan if entry.method != "dense")
    # two calls at rank 1 take longer than one call of the dense layer: 2 * 500 + 72 > 500 + 512
    assert {entry.name for entry in plan if entry.method != "dense"} == {"wide.0", "wide.1"}


def test_ranks_are_multiples(clock, stats):
    _, plan = planned(lr.Budget(latency=0.7), stats, round_to=8)
    assert {plan[name].rank % 8 for name in ("wide.0", "wide.1")} == {0}
    with pytest.raises(lr.LowRankError, match="round_to"):
        planned(lr.Budget(params=0.5), stats, round_to=0)


def test_what_is_out_of_reach_is_refused_with_what_is_not(clock, stats):
    model = Net()
    least = seconds(model) - 2 * TICK * (64 * 64 - 2 * 64 - CALL)
    with pytest.raises(lr.BudgetError, match=f"smallest this model can become is {1e3 * least:.3g} ms"):
        planned(lr.Budget(latency=0.2), stats, round_to=1)


def test_limits_on_size_and_time_together(clock, stats):
    model, plan = planned(lr.Budget(latency=timedelta(seconds=0.8 * seconds(Net())), params=0.5), stats)
    assert plan.after.latency <= 0.8 * seconds(model) * (1 + 1e-9)
    assert plan.after.params <= 0.5 * plan.total.params
    assert plan.settings["budget"]["latency"].endswith(" s")


def test_the_fastest_model_within_a_growth_of_the_loss(clock, stats):
    _, plan = planned(lr.Budget(latency=1.0, loss=0.1), stats, round_to=1)
    assert plan.loss <= 0.1
    assert plan.after.latency < plan.total.latency
    tight = planned(lr.Budget(latency=1.0, loss=0.01), stats, round_to=1)[1]
    assert tight.after.latency >= plan.after.latency


class Slowed(Net):
    """A net that takes longer as a whole than its layers do, where these are low-rank."""

    clock: Clock

    def forward(self, x: Tensor) -> Tensor:
        low = sum(isinstance(module, lr.LowRankLinear) for module in self.modules())
        self.clock.now += TICK * 400 * low
        return super().forward(x)


def test_the_time_of_the_whole_model_corrects_the_table(clock, stats):
    torch.manual_seed(1)
    model = Slowed()
    Slowed.clock = clock
    plan = lr.make_plan(model, lr.Budget(latency=0.8), stats=stats, round_to=1)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    true = seconds(small) + 800 * TICK
    assert plan.settings["measured"] == pytest.approx(true)
    # uncorrected, it would be off by 800 * TICK, a tenth
    assert plan.after.latency == pytest.approx(true, rel=0.03)


class Shared(Net):
    """A net that takes less time as a whole than its layers do, where these are low-rank."""

    clock: Clock

    def forward(self, x: Tensor) -> Tensor:
        low = sum(isinstance(module, lr.LowRankLinear) for module in self.modules())
        self.clock.now -= TICK * 400 * low
        return super().forward(x)


def test_a_limit_that_the_table_takes_for_out_of_reach_is_met_after_its_correction(clock, stats):
    torch.manual_seed(1)
    model = Shared()
    Shared.clock = clock
    least = seconds(model) - 2 * TICK * (64 * 64 - 2 * 64 - CALL)
    limit = least - 400 * TICK
    plan = lr.make_plan(model, lr.Budget(latency=limit / seconds(model)), stats=stats, round_to=1)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    assert plan.after.latency <= limit * (1 + 1e-3)
    assert seconds(small) - 800 * TICK == pytest.approx(plan.after.latency, rel=0.03)


class Pooled(Net):
    """A net with something that takes less time where the wide layers have small ranks."""

    clock: Clock
    pooling: Callable[[float], float]
    """Its time in weights, given the mean rank of the wide layers."""

    @property
    def extra(self) -> float:
        """Its seconds."""
        ranks = [layer.rank if isinstance(layer, lr.LowRankLinear) else 64 for layer in self.wide]
        return TICK * type(self).pooling(sum(ranks) / 2)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.extra
        return super().forward(x)


def pooled(clock, stats, monkeypatch, pooling, fraction):
    """A plan for a net with this time of pooling, the seconds that the limit means, and the true ones."""
    monkeypatch.setattr(Pooled, "clock", clock, raising=False)
    monkeypatch.setattr(Pooled, "pooling", staticmethod(pooling), raising=False)
    torch.manual_seed(1)
    model = Pooled()
    plan = lr.make_plan(model, lr.Budget(latency=fraction), stats=stats, round_to=1)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    return plan, fraction * (seconds(model) + model.extra), seconds(small) + small.extra


@pytest.mark.parametrize("power", [0.5, 1, 2, 6])
@pytest.mark.parametrize("fraction", [0.75, 0.6])
def test_time_outside_of_the_layers_is_predicted(clock, stats, monkeypatch, power, fraction):
    plan, limit, true = pooled(clock, stats, monkeypatch, lambda rank: 4000 * (rank / 64) ** power, fraction)
    assert plan.settings["measured"] == pytest.approx(true)
    assert true == pytest.approx(plan.after.latency, rel=fit.CLOSE)
    # one rank less or more of a wide layer is all that is left of the limit
    assert limit * (1 - fit.CLOSE) - 200 * TICK < plan.after.latency <= limit


def test_at_a_jump_the_limit_is_kept(clock, stats, monkeypatch):
    """Mean ranks above 8 exceed the limit, all others stay far below it."""
    plan, limit, true = pooled(clock, stats, monkeypatch, lambda rank: 3000.0 * (rank > 8), 0.55)
    assert plan.settings["measured"] == pytest.approx(true)
    assert plan.after.latency == pytest.approx(true)
    assert true <= limit
    assert plan["wide.0"].rank + plan["wide.1"].rank > 8


def test_time_that_cannot_be_saved_is_none_that_is_promised(clock, stats, monkeypatch):
    """Layers of least rank leave what a rank of 1 takes in pivot form, and the pooling."""
    least = seconds(Net()) - 2 * TICK * (64 * 64 - (2 * 64 - 1) - CALL) + 5000 * TICK
    with pytest.raises(lr.BudgetError, match=f"smallest this model can become is {1e3 * least:.3g} ms"):
        pooled(clock, stats, monkeypatch, lambda rank: 5000.0, 0.5)


def test_savings_lie_on_a_line_between_trials():
    tried = [Trial({}, 2.0, 1.0), Trial({}, 4.0, 5.0), Trial({}, 1.0, 0.5)]
    assert gain_at(0.25, tried) == 0.5
    assert gain_at(3.0, tried) == 3.0 / 3.0
    assert gain_at(5.0, tried) == 5.0 / 4.0
    assert gain_at(10.0, tried) == 5.0 / 4.0


def test_times_are_kept_on_disk(clock, stats, monkeypatch):
    first = planned(lr.Budget(latency=0.7), stats)[1]
    calls = clock.calls
    (file,) = (store.cache_folder()).glob("latency_*.json")
    ratios = json.loads(file.read_text())["ratios"]
    assert len(ratios) >= table.GRID
    monkeypatch.setattr(store.TimeStore, "_known", {})
    assert planned(lr.Budget(latency=0.7), stats)[1] == first
    assert clock.calls < 2 * calls  # layers anew and the whole model, replacements not
    monkeypatch.setattr(table, "time_replacements", None)  # nothing is left to be timed
    assert planned(lr.Budget(latency=0.7), stats)[1] == first


@pytest.mark.parametrize("text", ["{", '{"ratios": [1]}', '{"ratios": {"a": "b", "c": -1}}'])
def test_a_damaged_file_of_times_is_none(clock, stats, monkeypatch, text):
    plan = planned(lr.Budget(latency=0.7), stats)[1]
    (file,) = (store.cache_folder()).glob("latency_*.json")
    file.write_text(text)
    monkeypatch.setattr(store.TimeStore, "_known", {})
    assert planned(lr.Budget(latency=0.7), stats)[1] == plan


def test_a_folder_that_cannot_be_written_is_no_obstacle(clock, stats, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert planned(lr.Budget(latency=0.7), stats)[1].after.latency > 0


def test_the_model_and_the_random_generator_stay_as_they_were(clock, stats):
    torch.manual_seed(1)
    model = Net().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    lr.make_plan(model, lr.Budget(latency=0.7), stats=stats)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and "forward" not in vars(module) for module in model.modules())


def test_a_model_that_fails_keeps_its_forwards(clock, stats):
    model = Net()
    model.last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lr.make_plan(model, lr.Budget(latency=0.7), example=torch.randn(1, 64), skip=["last"])
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_edit_has_no_measured_time(clock, stats, tmp_path):
    _, plan = planned(lr.Budget(latency=0.7), stats)
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json") == plan
    plan.set_rank("wide.0", 3)
    assert plan.achieved()["latency"][1] is None
    assert "measured" not in str(plan)
    assert "limits: unknown of at most" in str(plan)


def test_the_projections_of_an_attention_are_timed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store.TimeStore, "_known", {})
    model = nn.Sequential(nn.TransformerEncoderLayer(256, 2, 512, batch_first=True)).eval()
    x = torch.randn(1, 8, 256)
    monkeypatch.setattr(fit, "time_ratio", lambda *_: 0.9)  # real times, which other programs may disturb
    plan = lr.make_plan(model, lr.Budget(latency=timedelta(hours=1), params=0.5), example=x)
    assert {entry.name.rpartition(".")[2] for entry in plan} >= {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert all(entry.before.latency > 0 for entry in plan)
    small = lr.factorize_(copy.deepcopy(model), plan)
    assert time_ratio(model, small, ExampleRun(x, False)) > 0


def test_shared_layers_take_the_time_of_all_their_calls(clock):
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(64, 64))
    plan = lr.make_plan(model, lr.Budget(latency=0.6), example=torch.randn(1, 64), round_to=1)
    assert plan["0"].before.latency == pytest.approx(2 * plan["3"].before.latency)
    small = lr.factorize_(copy.deepcopy(model), plan)
    assert isinstance(small[0], lr.LowRankLinear)
    assert small[0] is small[2]


def test_without_a_batch_to_run_it_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(lr.BudgetError, match="needs a batch to run the model on"):
        lr.make_plan(model, lr.Budget(latency=0.5))
    with lr.Calibration(model) as stats:
        model(torch.randn(4, 8))
    with pytest.raises(lr.BudgetError, match="needs a batch to run the model on"):
        lr.make_plan(model, lr.Budget(latency=0.5), stats=stats)
