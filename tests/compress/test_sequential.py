"""Layers fitted one after the other: each is the best map from what the compressed layers before it deliver."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

UNDAMPED = lr.Damping(inputs=0.0, outputs=0.0)


@pytest.fixture
def rows() -> Tensor:
    return (torch.randn(6000, 12) @ torch.randn(12, 12) + 0.5).double()


def network(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8, bias=bias), nn.Tanh(), nn.Linear(8, 6)).double()


def factorized(model: nn.Module, rows: Tensor, ranks: dict[str, int]) -> nn.Module:
    """One-sided, so that the optimum is that of ordinary least squares."""
    small = copy.deepcopy(model)
    stats = lr.calibrate(model, list(rows.split(1000)))
    plan = lr.make_plan(model, rank=1, stats=stats, damping=UNDAMPED)
    for entry in list(plan):
        plan.set_rank(entry.name, ranks[entry.name]) if entry.name in ranks else plan.drop(entry.name)
    return lr.factorize_(small, plan, stats=stats, data=list(rows.split(1000)))


def least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    return inputs @ torch.linalg.lstsq(inputs, outputs).solution


@pytest.mark.parametrize("rank", [1, 3])
def test_a_layer_is_the_reduced_rank_regression_on_the_compressed_prefix(rows, rank):
    """Of the dense model's outputs on the compressed model's inputs, by the closed form (Izenman, 1975)."""
    model = network()
    small = factorized(model, rows, {"0": 4, "2": rank})
    inputs, target = small[:2](rows).detach(), model[:3](rows).detach()
    centred = target - target.mean(0)
    fit = least_squares(inputs - inputs.mean(0), centred)
    u, s, vh = torch.linalg.svd(fit, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] + target.mean(0)
    assert torch.allclose(small[2](inputs), best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_stays_dense_is_refitted(rows, bias):
    model = network(bias)
    small = factorized(model, rows, {"0": 2})
    inputs, target = small[:2](rows).detach(), model[:3](rows).detach()
    known = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1) if bias else inputs
    assert type(small[2]) is nn.Linear
    assert torch.allclose(small[2](inputs), least_squares(known, target), rtol=1e-6, atol=1e-8)


def test_layers_before_the_first_compressed_one_stay_as_they_are(rows):
    model = network()
    small = factorized(model, rows, {"4": 2})
    for name in ("0", "2"):
        assert torch.equal(small.get_submodule(name).weight, model.get_submodule(name).weight)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(12, 10).double(), nn.Linear(10, 10).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))


def test_all_calls_of_a_shared_layer_count(rows):
    """It is fitted to the rows of both calls; at the second one the copy still has the dense layer."""
    model = Shared()
    small = factorized(model, rows, {"first": 5})
    inputs, targets = [], []
    for module, calls in ((small, inputs), (model, targets)):
        x = torch.tanh(module.first(rows))
        calls += [x, torch.tanh(model.twice(x))]
    inputs, targets = torch.cat(inputs).detach(), model.twice(torch.cat(targets)).detach()
    known = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
    assert torch.allclose(small.twice(inputs), least_squares(known, targets), rtol=1e-6, atol=1e-8)


def test_an_embedding_is_not_regressed_on_its_indices():
    model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 10)).double()
    data = [torch.randint(0, 30, (40, 5))]
    stats = lr.calibrate(model, data)
    plan = lr.make_plan(model, rank=3, stats=stats)
    alone = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats, data=data)
    assert torch.equal(small[0].weight, alone[0].weight)
    assert not torch.equal(small[1].weight, alone[1].weight)


def test_values_that_are_not_finite_are_refused_and_change_nothing(rows):
    model = network()
    stats = lr.calibrate(model, [rows])
    plan = lr.make_plan(model, rank=2, stats=stats)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lr.LowRankError, match="'2': got NaN or Inf"):
        lr.factorize_(model, plan, stats=stats, data=[rows.clone().fill_(float("nan"))])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
