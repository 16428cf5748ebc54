"""What is particular to linear layers as block tensor trains, beyond what every layer promises."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.request import make_request
from lowrank_layers.modules.factor_moments import factor_moments

from ..contracts.tables import relative


def test_the_split_of_known_sizes():
    assert lr.TensorizedLinear(256, 120, rank=2).split == ((12, 10), (16, 16))
    assert lr.TensorizedLinear(13, 7, rank=2).split == ((7, 1), (1, 13))
    assert lr.TensorizedLinear(64, 30, rank=2, order=3).split == ((5, 3, 2), (4, 4, 4))


def test_two_cores_are_a_sum_of_kronecker_products():
    layer = lr.TensorizedLinear(12, 10, rank=3, dtype=torch.float64)
    first, second = layer.cores()
    expected = sum(torch.kron(first[0, :, :, r], second[r, :, :, 0]) for r in range(3))
    assert relative(layer.weight, expected) < 1e-14
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    assert relative(layer(x), x @ expected.mT + layer.bias) < 1e-13


def test_two_cores_are_the_best_sum_of_kronecker_products():
    """The error is the tail of the singular values of the rearranged weight (Van Loan and Pitsianis, 1993)."""
    dense = nn.Linear(12, 10, dtype=torch.float64)
    (a, b), (c, d) = split = (5, 2), (3, 4)
    values = torch.linalg.svdvals(dense.weight.detach().reshape(a, b, c, d).transpose(1, 2).reshape(a * c, b * d))
    for rank in range(1, len(values) + 1):
        layer = lr.TensorizedLinear.from_dense(dense, rank=rank, split=split)
        error = (layer.weight - dense.weight).detach().norm()
        assert float(error) == pytest.approx(float(values[rank:].norm()), rel=1e-10, abs=1e-13)


def test_few_parameters_can_have_full_matrix_rank():
    layer = lr.TensorizedLinear(64, 64, rank=1, bias=False, dtype=torch.float64)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 64
    assert int(torch.linalg.matrix_rank(layer.weight)) == 64


@pytest.mark.parametrize("form", [{"order": 3}, {"split": ((2, 5), (3, 4))}, {"split": ((2, 1, 5), (3, 2, 2))}])
def test_orders_and_splits_of_ones_own_are_kept_there_and_back(form, tmp_path):
    dense = nn.Linear(12, 10, dtype=torch.float64)
    layer = lr.TensorizedLinear.from_dense(dense, rank=2, **form)
    assert {key: as_tuples(value) for key, value in layer.form.items()} == form
    again = lr.TensorizedLinear.from_dense(layer.to_dense(), rank=layer.rank, **layer.form)
    assert relative(again.weight, layer.weight) < 1e-12
    assert relative(lr.TensorizedLinear.from_dense(dense, rank=1000, **form).weight, dense.weight) < 1e-13
    lr.save(nn.Sequential(layer), tmp_path / "model.safetensors")
    loaded = lr.load(tmp_path / "model.safetensors", into=nn.Sequential(copy.deepcopy(dense)))
    assert repr(loaded[0]) == repr(layer)
    assert torch.equal(loaded[0].weight, layer.weight)


def as_tuples(value):
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("split", [((3, 4), (3, 4)), ((2, 5), (3, 3)), ((10,), (12,)), 7])
def test_splits_that_do_not_fit_are_refused(split):
    with pytest.raises(lr.LowRankError, match=r"TensorizedLinear.*split.*exactly 10 .*exactly 12"):
        lr.TensorizedLinear(12, 10, rank=2, split=split)


@pytest.mark.parametrize("order", [1, True, 2.0])
def test_bad_orders_are_refused(order):
    with pytest.raises(lr.LowRankError, match=r"TensorizedLinear.*order"):
        lr.TensorizedLinear(12, 10, rank=2, order=order)


def test_cores_above_the_largest_rank_of_use_are_rounded_off():
    cores = torch.randn(1, 2, 2, 9, dtype=torch.float64), torch.randn(9, 5, 6, 1, dtype=torch.float64)
    dense = nn.Linear(12, 10, bias=False, dtype=torch.float64)
    layer = lr.TensorizedLinear.from_cores(dense, cores, None)
    assert layer.rank == (4,)
    assert relative(layer.weight, lr.BlockTT(cores, 10).to_dense()) < 1e-13


def test_moments_of_an_optimizer_are_not_carried_over_as_those_of_a_pair():
    dense = nn.Linear(9, 9)
    old, new = (lr.TensorizedLinear.from_dense(dense, rank=rank) for rank in (3, 2))
    assert factor_moments(old, new) is None
    pair = [lr.LowRankLinear.from_dense(dense, rank=rank) for rank in (3, 2)]
    assert factor_moments(*pair) is not None


def test_a_plan_names_it_on_request_and_never_by_itself(tmp_path):
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 6))
    assert lr.TensorizedLinearMethod().options(lr.Candidate(model[0])) == []
    plan = lr.make_plan(model, rank=2)
    assert [entry.method for entry in plan] == ["svd", "svd"]
    assert lr.TensorizedLinearMethod() not in make_request(None, None, None, None, 1).methods
    plan.set_rank("0", 3, method="tensorized_linear")
    plan.save(tmp_path / "plan.json")
    small = lr.factorize_(copy.deepcopy(model), lr.Plan.load(tmp_path / "plan.json"))
    assert type(small[0]) is lr.TensorizedLinear
    assert small[0].rank == (3,)
    assert relative(small[0].weight, lr.TensorizedLinear.from_dense(model[0], rank=3).weight) < 1e-6
    assert [(entry.method, entry.rank) for entry in lr.Plan.from_model(small)] == [
        ("tensorized_linear", (3,)),
        ("svd", 2),
    ]


def test_options_compete_where_they_are_asked_for():
    torch.manual_seed(0)
    weight = sum(torch.kron(torch.randn(8, 8), torch.randn(8, 8)) for _ in range(2))
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    plan = lr.make_plan(model, lr.Budget(params=0.1), methods=[lr.SVDMethod(), lr.TensorizedLinearMethod(steps=32)])
    (entry,) = plan
    assert entry.method == "tensorized_linear"
    assert relative(lr.factorize_(model, plan)[0].weight, weight) < 1e-5
