import copy
import json

import pytest
import torch
from torch import nn

import lowrank_layers as lr


class Own(nn.Conv2d):
    pass


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Own(16, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 20)
    )


@pytest.fixture
def data():
    return [torch.randn(32, 3, 8, 8)]


@pytest.fixture
def stats(model, data):
    return lr.calibrate(model, data, loss=lr.SampledCrossEntropy())


def test_the_table_names_every_layer_and_every_reason(model, stats):
    text = str(lr.make_plan(model, lr.Budget(params=0.4), stats=stats, skip=["0"]))
    assert "0: left alone, as asked" in text
    assert "2: left alone, no method for Own, a subclass of nn.Conv2d" in text
    assert "whole model" in text
    assert "% kept" in text
    assert "pivot" in text


def test_json_round_trip(model, stats, tmp_path):
    plan = lr.make_plan(model, lr.Budget(params=0.4), stats=stats)
    plan.save(tmp_path / "plan.json")
    loaded = lr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    ours, theirs = (p.apply(copy.deepcopy(model), stats=stats) for p in (plan, loaded))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "rank", "method", "result"),
    [
        ("4", 3, None, 3),
        ("4", 10**6, None, 20),
        ("4", lr.ParameterFraction(0.1), None, 1),
        ("0", 5, "svd", 5),
        ("0", (4, 2), "tucker", (4, 2)),
        ("0", 7, "cp", 7),
    ],
)
def test_edits_change_rank_and_cost_and_apply(model, stats, name, rank, method, result):
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats=stats)
    assert plan.set_rank(name, rank, method=method) is plan
    assert plan[name].rank == result
    lr.factorize_(model, plan, stats=stats)
    assert model.get_submodule(name).rank == result
    assert plan.after.params == sum(p.numel() for p in model.parameters())
    measured = lr.layer_cost(model.get_submodule(name), stats[name].input_shape)
    assert plan[name].after == measured


def test_drop_leaves_a_layer_dense(model, stats):
    plan = lr.make_plan(model, rank=2, stats=stats).drop("4")
    lr.factorize_(model, plan, stats=stats)
    assert type(model[4]) is nn.Linear
    assert isinstance(model[0], lr.LowRankConv2d)


def test_from_model_reads_it_back(model, stats):
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats)
    lr.factorize_(model, plan, stats=stats)
    back = lr.Plan.from_model(model)
    assert {e.name: (e.method, e.rank) for e in back} == {
        e.name: (e.method, e.rank) for e in plan if e.method != "dense"
    }
    assert back.after.params == sum(p.numel() for p in model.parameters())


def test_planning_does_not_touch_the_model(model, stats):
    before = copy.deepcopy(model.state_dict())
    lr.make_plan(model, lr.Budget(params=0.3), stats=stats)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_plan_is_deterministic(model, data):
    plans = []
    for _ in range(2):
        stats = lr.calibrate(model, data, loss=lr.SampledCrossEntropy())
        plans.append(lr.make_plan(model, lr.Budget(params=0.4), stats=stats).to_json())
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body.update(format="other"),
        lambda body: body.update(version=99),
        lambda body: body.pop("entries"),
        lambda body: body["entries"][0].pop("layer"),
        lambda body: body["entries"][0].update(method="magic"),
        lambda body: body["entries"][0].update(surprise=1),
        lambda body: body["total"].update(params2=3),
    ],
)
def test_damaged_plans_are_refused_by_file_name(model, stats, tmp_path, damage):
    body = json.loads(lr.make_plan(model, lr.Budget(params=0.4), stats=stats).to_json())
    damage(body)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(body))
    with pytest.raises(lr.LowRankError, match=r"plan\.json"):
        lr.Plan.load(path)
