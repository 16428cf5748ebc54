"""What is particular to linear layers in pivot form, beyond what every layer promises."""

import copy
import itertools

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules.factor_moments import factor_moments

from ..contracts.tables import HALF_TOLERANCE, relative

SIZES = [(12, 9), (9, 12), (8, 8), (64, 48)]


def both(sizes, rank, dtype=torch.float64):
    """A pair, and its pivot form."""
    linear = nn.Linear(*sizes, dtype=dtype)
    pair = lr.LowRankLinear.from_dense(linear, rank=rank)
    return pair, lr.PivotLinear.from_pair(linear, pair.up.weight, pair.down.weight, pair.bias)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, None)])
def test_it_is_the_map_of_the_pair(sizes, dtype, close):
    for rank in {1, 2, min(sizes) // 2, min(sizes) - 1, min(sizes)}:
        pair, pivot = both(sizes, rank, dtype)
        exact = copy.deepcopy(pair).double()
        x = torch.randn(5, sizes[0], dtype=dtype)
        expected = exact(x.double())
        assert relative(pivot(x), expected) < (close or HALF_TOLERANCE[dtype]), rank
        assert relative(pivot.weight, exact.weight) < (close or HALF_TOLERANCE[dtype]), rank


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_has_a_square_of_numbers_less_than_the_pair_and_fewer_than_the_dense_layer(sizes):
    n, m = sizes
    for rank in range(1, min(sizes) + 1):
        pair, pivot = both(sizes, rank)
        costs = [lr.layer_cost(layer, (7, n)) for layer in (pair, pivot)]
        assert costs[1].params == rank * (m + n - rank) + m == costs[0].params - rank**2
        assert costs[1].macs == 7 * rank * (m + n - rank)
        assert (costs[1].params < m * n + m) == (rank < min(sizes))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75, 0.99, 1.0])
def test_a_fraction_of_the_parameters_is_one_of_the_pivot_form(fraction):
    linear = nn.Linear(24, 40, bias=False)
    plan = lr.make_plan(nn.Sequential(linear), rank=lr.ParameterFraction(fraction), methods=[lr.PivotMethod()])
    layers = [
        lr.PivotLinear(24, 40, bias=False, rank=lr.ParameterFraction(fraction)),
        lr.PivotLinear.from_dense(linear, rank=lr.ParameterFraction(fraction)),
        lr.PivotConv1d(24, 40, 1, bias=False, rank=lr.ParameterFraction(fraction)),
        lr.PivotConv1d.from_dense(nn.Conv1d(24, 40, 1, bias=False), rank=lr.ParameterFraction(fraction)),
    ]
    assert {layer.rank for layer in layers} == {plan["0"].rank}
    rank = layers[0].rank
    assert rank * (64 - rank) <= fraction * 24 * 40
    assert rank == 24 or (rank + 1) * (63 - rank) > fraction * 24 * 40


def test_the_pivots_are_columns_of_the_weight():
    _, pivot = both((12, 9), 4)
    assert torch.equal(pivot.weight[:, pivot.order[:4]], pivot.up.weight)
    assert torch.equal(pivot.basis[:, pivot.order], torch.cat([torch.eye(4).double(), pivot.down.weight], 1))


@pytest.mark.parametrize("true", [0, 1, 3])
def test_pairs_of_a_smaller_rank(true):
    linear = nn.Linear(12, 9, dtype=torch.float64)
    up, down = torch.randn(9, 5, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    up[:, true:] = 0
    for u, d in ((up, down), (torch.randn_like(up), up.mT @ torch.randn(9, 12, dtype=torch.float64))):
        pivot = lr.PivotLinear.from_pair(linear, u, d, None)
        assert torch.allclose(pivot.weight, u @ d, rtol=1e-12, atol=1e-12)
        assert float(pivot.down.weight.detach().abs().max()) <= 1.11


def test_there_and_back():
    _, pivot = both((12, 9), 4)
    x = torch.randn(3, 12, dtype=torch.float64)
    pair = pivot.to_pair()
    assert type(pair) is lr.LowRankLinear
    assert pair.rank == 4
    assert relative(pair(x), pivot(x)) < 1e-14
    again = lr.PivotLinear.from_pair(pair.to_dense(), pair.up.weight, pair.down.weight, pair.bias)
    assert relative(again(x), pivot(x)) < 1e-14


@pytest.mark.parametrize("shapes", [((9, 3), (4, 12)), ((8, 3), (3, 12)), ((9, 10), (10, 12)), ((9, 0), (0, 12))])
def test_factors_of_other_shapes_are_refused(shapes):
    with pytest.raises(lr.LowRankError, match=r"expected \[9, 'r'\] and \['r', 12\] with r at most 9"):
        lr.PivotLinear.from_pair(nn.Linear(12, 9), *map(torch.zeros, shapes), None)


def test_the_order_is_in_the_file(tmp_path):
    model = nn.Sequential(both((12, 9), 4, torch.float32)[1])
    lr.save(model, tmp_path / "model.safetensors")
    loaded = lr.load(tmp_path / "model.safetensors", into=nn.Sequential(nn.Linear(12, 9)))
    x = torch.randn(3, 12)
    assert torch.equal(loaded[0].order, model[0].order)
    assert torch.equal(loaded(x), model(x))
    assert lr.Plan.from_model(model)["0"].method == "pivot"


def test_optimizer_moments_do_not_follow_other_pivots():
    layers = [both((12, 9), 4)[1] for _ in range(2)]
    assert factor_moments(*layers) is None


def test_hidden_units_are_removed():
    """Inputs and outputs go as they do from pairs, and the layers stay in pivot form."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    data = [torch.randn(200, 16, dtype=torch.float64)]
    pivots = copy.deepcopy(dense)
    lr.factorize_(pivots, lr.make_plan(dense, rank=6, methods=[lr.PivotMethod()], skip=["4"]))
    pairs = copy.deepcopy(pivots)
    for name in ("0", "2"):
        setattr(pairs, name, pairs.get_submodule(name).to_pair())
    counts = [sum(p.numel() for p in model.parameters()) for model in (pairs, pivots)]
    for model, count in zip((pairs, pivots), counts, strict=True):
        lr.remove_units_(model, data, lr.Budget(params=count - 200))
        assert count - 220 < sum(p.numel() for p in model.parameters()) <= count - 200
    assert [type(pivots[k]) for k in (0, 2)] == [lr.PivotLinear] * 2
    for a, b in itertools.product(("0", "2"), ("in_features", "out_features")):
        assert getattr(pivots.get_submodule(a), b) == getattr(pairs.get_submodule(a), b)
    assert relative(pivots(data[0]), pairs(data[0])) < 1e-9


def test_a_model_trains_in_pivot_form():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    data = [torch.randn(64, 16) for _ in range(4)]
    model = lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, lr.Budget(params=0.5)))
    assert isinstance(model[0], lr.PivotLinear)

    @torch.no_grad()
    def distance():
        return sum(float((model(x) - dense(x)).square().mean()) for x in data)

    before = distance()
    order = model[0].order.clone()
    lr.recover_(model, data, teacher=dense, steps=60)
    assert distance() < before
    assert torch.equal(model[0].order, order)
