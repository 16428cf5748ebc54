"""What is particular to convolutions in pivot form, beyond what every layer promises."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from ..contracts.tables import HALF_TOLERANCE, relative

CONVS = {
    "pointwise": lambda **more: nn.Conv2d(12, 9, 1, **more),
    "wide": lambda **more: nn.Conv2d(3, 40, 3, padding=1, **more),
    "groups": lambda **more: nn.Conv2d(8, 12, 3, stride=2, groups=2, **more),
    "1d": lambda **more: nn.Conv1d(6, 8, 5, padding=2, padding_mode="circular", **more),
    "3d": lambda **more: nn.Conv3d(4, 6, 2, dilation=2, bias=False, **more),
}
convs = pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)


def both(make, rank, dtype=torch.float64):
    """A pair, its pivot form and an input."""
    conv = make(dtype=dtype)
    dims = len(conv.kernel_size)
    pair = getattr(lr, f"LowRankConv{dims}d").from_dense(conv, rank=rank)
    pivot = getattr(lr, f"PivotConv{dims}d").of_pair(pair)
    return pair, pivot, torch.randn(2, conv.in_channels, *[7] * dims, dtype=dtype)


@convs
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, None)])
def test_it_is_the_map_of_the_pair(make, dtype, close):
    for rank in (1, 3, 5, 1000):
        pair, pivot, x = both(make, rank, dtype)
        assert pivot.rank == pair.rank
        exact = copy.deepcopy(pair).double()
        assert relative(pivot(x), exact(x.double())) < (close or HALF_TOLERANCE[dtype]), rank
        assert relative(pivot.weight, exact.weight) < (close or HALF_TOLERANCE[dtype]), rank


@convs
def test_it_has_a_square_of_numbers_per_group_less_than_the_pair_and_as_many_products(make):
    for rank in (1, 3, 5, 1000):
        pair, pivot, x = both(make, rank)
        costs = [lr.layer_cost(layer, tuple(x.shape[1:])) for layer in (pair, pivot)]
        assert costs[1].params == costs[0].params - pair.groups * pair.rank**2
        assert costs[1].macs == costs[0].macs
        assert lr.layers.layer_writes(pivot, tuple(x.shape[1:])) == lr.layers.layer_writes(pair, tuple(x.shape[1:]))


@convs
def test_the_pivots_are_outputs(make):
    _, pivot, x = both(make, 3)
    of_rows = torch.arange(3 * pivot.groups)
    channels = pivot.position.argsort()[of_rows]
    outputs = pivot(x)[:, channels]
    bias = 0 if pivot.bias is None else pivot.bias[channels].view(-1, *[1] * (x.ndim - 2))
    assert relative(outputs, pivot.down(x) + bias) < 1e-14


def test_pairs_of_a_smaller_rank():
    conv = nn.Conv2d(4, 9, 3, dtype=torch.float64)
    lasts, firsts = torch.randn(1, 9, 5, dtype=torch.float64), torch.randn(1, 5, 36, dtype=torch.float64)
    lasts[..., 2:] = 0
    pivot = lr.PivotConv2d.from_pairs(conv, lasts, firsts, None)
    assert torch.allclose(pivot.weight.flatten(1), (lasts @ firsts)[0], rtol=1e-12, atol=1e-12)


@convs
def test_there_and_back(make):
    pair, pivot, x = both(make, 3)
    back = pivot.to_pair()
    assert type(back) is type(pair)
    assert relative(back(x), pivot(x)) < 1e-14


def test_hidden_units_are_removed():
    torch.manual_seed(0)
    dense = nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(10, 4),
    ).double()
    data = [torch.randn(20, 3, 9, 9, dtype=torch.float64)]
    pivots = lr.factorize_(dense, lr.make_plan(dense, rank=3, methods=[lr.PivotMethod()], skip=["6"]))
    pairs = copy.deepcopy(pivots)
    for name in ("0", "2"):
        setattr(pairs, name, pairs.get_submodule(name).to_pair())
    for model in (pairs, pivots):
        count = sum(p.numel() for p in model.parameters())
        lr.remove_units_(model, data, lr.Budget(params=count - 100))
        assert sum(p.numel() for p in model.parameters()) <= count - 100
    assert [type(pivots[k]) for k in (0, 2)] == [lr.PivotConv2d] * 2
    assert pivots[0].out_channels == pairs[0].out_channels < 12
    assert relative(pivots(data[0]), pairs(data[0])) < 1e-9


def test_a_convolution_that_learns_keeps_its_places():
    torch.manual_seed(0)
    _, pivot, x = both(CONVS["pointwise"], 4, torch.float32)
    before = pivot.position.clone()
    optimizer = torch.optim.AdamW(pivot.parameters(), lr=1e-2)
    target = torch.randn_like(pivot(x))
    losses = []
    for _ in range(20):
        loss = (pivot(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(pivot.position, before)
