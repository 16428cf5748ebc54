"""Plans choose the pivot form wherever it costs less."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 8)).eval()


@pytest.fixture
def data():
    return [torch.randn(100, 24) @ torch.randn(24, 24) for _ in range(3)]


@pytest.mark.parametrize("limit", [{"params": 0.4}, {"params": 0.8}, {"macs": 0.5}, {"bytes": 0.6}], ids=str)
def test_a_plan_with_pivots_loses_less_than_one_of_pairs(model, data, limit):
    stats = lr.calibrate(model, data, loss=lr.SampledCrossEntropy())
    budget = lr.Budget(**limit)
    with_pivots = lr.make_plan(model, budget, stats=stats, units="absolute")
    pairs = lr.make_plan(model, budget, stats=stats, methods=[lr.SVDMethod()], units="absolute")
    assert with_pivots.loss < pairs.loss
    # bytes count the order of the inputs, which is more than a pair's r * r numbers at low ranks
    assert {entry.method for entry in with_pivots} <= {"pivot", "dense"} | ({"svd"} if "bytes" in limit else set())
    small = lr.factorize_(copy.deepcopy(model), with_pivots, stats=stats)
    assert with_pivots.after.params == sum(p.numel() for p in small.parameters())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in small.state_dict().values())
    assert with_pivots.after.bytes == lr.Plan.from_model(small).after.bytes == stored


def test_options_are_those_of_pairs_for_less(model, data):
    stats = lr.calibrate(model, data, loss=lr.SampledCrossEntropy())
    for name in ("0", "2", "4"):
        layer = lr.Candidate(model.get_submodule(name), stats[name])
        pairs = {option.rank: option for option in lr.SVDMethod().options(layer)}
        pivots = {option.rank: option for option in lr.PivotMethod().options(layer)}
        out, into = layer.module.weight.shape
        ranks = range(1, min(out, into))
        assert list(pivots) == [r for r in ranks if 4 * r * (out + into - r) + 8 * into <= 4 * out * into]
        for rank in pairs.keys() & pivots.keys():
            pair = pairs[rank]
            assert pivots[rank].loss_increase == pair.loss_increase
            assert pivots[rank].cost.params == pair.cost.params - rank**2
            assert pivots[rank].cost.macs == pair.cost.macs - rank**2
            assert pivots[rank].cost.bytes == pair.cost.bytes - 4 * rank**2 + 8 * into


def test_costs_that_were_rounded_are_right_to_one_unit(model, data):
    """A layer that is called 1.37 times per sample on average."""
    stats = lr.calibrate(model, data)["2"].changed(repeats=1.37)
    layer = lr.Candidate(model[2], stats)
    for option in lr.PivotMethod().options(layer):
        built = lr.PivotMethod().build(layer, option.rank)
        assert abs(option.cost.macs - lr.CountedCost().cost(built, stats).macs) <= 1


def test_the_built_layer_is_the_pair_that_svd_builds(model, data):
    stats = lr.calibrate(model, data, loss=lr.SampledCrossEntropy())
    for known in (None, stats["0"]):
        layer = lr.Candidate(model[0], known)
        pair, pivot = (method.build(layer, 7) for method in (lr.SVDMethod(), lr.PivotMethod()))
        expected = pair(data[0]).detach()
        assert torch.allclose(pivot(data[0]), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert torch.allclose(pivot.bias, pair.bias, rtol=1e-5, atol=1e-6)


def test_a_plan_is_edited_and_read_back(model, tmp_path):
    plan = lr.make_plan(model, lr.Budget(params=0.5))
    plan = plan.set_rank("0", 5, method="pivot")
    assert plan["0"].after.params == 5 * (24 + 48 - 5) + 48
    plan.save(tmp_path / "plan.json")
    small = lr.factorize_(copy.deepcopy(model), lr.Plan.load(tmp_path / "plan.json"))
    assert isinstance(small[0], lr.PivotLinear)
    assert small[0].rank == 5


def test_convolutions_with_a_larger_kernel_than_asked_for_get_no_options():
    torch.manual_seed(0)
    convs = nn.Sequential(nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Conv2d(20, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 5))
    for limit, offered in ((1, [False, True, False]), (9, [True, True, False]), (25, [True, True, True])):
        method = lr.PivotMethod(max_kernel=limit)
        assert [bool(method.options(lr.Candidate(convs[k]))) for k in (0, 2, 4)] == offered
    pointwise = lr.make_plan(convs, lr.Budget(params=0.5, of="planned"), skip=["0", "4"])
    assert pointwise["2"].method == "pivot"
    assert "pivot" not in {entry.method for entry in lr.make_plan(convs, lr.Budget(params=0.5), skip=["2"])}


def test_a_plan_that_was_asked_for_larger_kernels_is_read_back(tmp_path):
    torch.manual_seed(0)
    convs = nn.Sequential(nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Conv2d(20, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 5))
    plan = lr.make_plan(convs, rank=6, methods=[lr.PivotMethod(max_kernel=9)], skip=["4"])
    assert [entry.settings for entry in plan] == [{"max_kernel": 9}] * 2
    assert plan.set_rank("0", 5).set_rank("2", 5, method="svd")["0"].method == "pivot"
    plan.save(tmp_path / "plan.json")
    small = lr.factorize_(copy.deepcopy(convs), lr.Plan.load(tmp_path / "plan.json"))
    assert [type(small[k]) for k in (0, 2, 4)] == [lr.PivotConv2d, lr.LowRankConv2d, nn.Conv2d]
    assert small[0].rank == 5
