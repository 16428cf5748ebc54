"""Capacity gathers what torch and scikit-learn say of each layer."""

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

import lowrank_layers as lr


class Reversed(nn.Module):
    """Its layers run in another order than it holds them."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 4)
        self.first = nn.Linear(10, 16)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_numbers_and_order():
    model, x = Reversed(), torch.randn(100, 10)
    found = {layer.name: layer for layer in lr.capacity(model, [x[:30], x[30:]])}
    assert list(found) == ["first", "last", "unused"]
    for name, layer in found.items():
        weight = model.get_submodule(name).weight.detach().double()
        s = torch.linalg.svdvals(weight)
        assert layer.rank == torch.linalg.matrix_rank(weight)
        assert layer.condition == pytest.approx(float(torch.linalg.cond(weight)), rel=1e-5)
        assert layer.weight_dimension == pytest.approx(float(s.square().sum() ** 2 / s.pow(4).sum()), rel=1e-5)
    with torch.no_grad():
        v = PCA(svd_solver="full").fit(model(x).double().numpy()).explained_variance_
    assert found["last"].output_dimension == pytest.approx(v.sum() ** 2 / (v**2).sum(), rel=1e-5)
    assert found["unused"].output_dimension is None


def test_without_data_and_the_bottleneck():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(20, 3) @ torch.randn(3, 20))
    found = lr.capacity(model)
    assert [layer.rank for layer in found] == [20, 3, 20]
    assert found.bottleneck.name == "1"
    assert all(layer.output_dimension is None for layer in found)
    assert "least rank: 3, of '1'" in str(found)


def test_half_precision_counts_the_rank_of_what_is_stored():
    layer = nn.Linear(300, 200, dtype=torch.bfloat16)
    assert [each.rank for each in lr.capacity(nn.Sequential(layer))] == [200]
