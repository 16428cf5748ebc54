import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import lowrank_layers as lr
from lowrank_layers import Cost

costs = st.builds(Cost, *[st.integers(-(10**12), 10**12)] * 3)
derandomized = settings(deadline=None, derandomize=True, max_examples=40)


@derandomized
@given(a=costs, b=costs, c=costs)
def test_costs_form_a_group(a, b, c):
    zero = Cost()
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + zero == a
    assert a - a == zero
    assert (a - b) + b == a


@derandomized
@given(a=costs, b=costs)
def test_every_field_is_added(a, b):
    total, difference = a + b, a - b
    for field in dataclasses.fields(Cost):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert getattr(total, field.name) == x + y
        assert getattr(difference, field.name) == x - y


def test_costs_sum():
    assert sum([Cost(1, 2, 3), Cost(10, 20, 30)], Cost()) == Cost(params=11, macs=22, bytes=33)


def test_a_cost_is_a_frozen_value():
    cost = Cost(1, 2, 3)
    assert len({cost, Cost(1, 2, 3)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cost.params = 4


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(6, 4), (6,), Cost(28, 24, 112)),
        (nn.Linear(6, 4, bias=False), (5, 6), Cost(24, 120, 96)),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 8, 8), Cost(224, 216 * 16, 896)),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5), Cost(72, 72 * 9, 288)),
        (nn.Embedding(10, 4), (7,), Cost(40, 0, 160)),
        (nn.Linear(6, 4, dtype=torch.bfloat16), (6,), Cost(28, 24, 56)),
        (lr.LowRankLinear(6, 4, rank=2), (6,), Cost(24, 20, 96)),
        (lr.LowRankConv2d(3, 8, 3, rank=2, bias=False), (3, 5, 5), Cost(54 + 16, 70 * 9, 280)),
        # and the order of inputs or outputs, in int64
        (lr.PivotLinear(6, 4, rank=2), (6,), Cost(20, 16, 80 + 6 * 8)),
        (lr.PivotConv2d(3, 8, 3, rank=2, bias=False), (3, 5, 5), Cost(54 + 12, 70 * 9, 264 + 8 * 8)),
        # 1 x 1 on 25 positions, 3 x 3 and 1 x 1 on 9
        (lr.TuckerConv2d(4, 8, 3, rank=(3, 2), bias=False), (4, 5, 5), Cost(86, 8 * 25 + 54 * 9 + 24 * 9, 344)),
        # 1 x 1 on 25, 3 x 1 on 15, 1 x 3 and 1 x 1 on 9
        (lr.CPConv2d(4, 8, 3, rank=2, bias=False), (4, 5, 5), Cost(36, 8 * 25 + 6 * 15 + 6 * 9 + 16 * 9, 144)),
        (lr.LowRankEmbedding(10, 4, rank=2), (7,), Cost(28, 7 * 8, 112)),
    ],
    ids=str,
)
def test_cost_of_a_layer_by_hand(layer, shape, expected):
    assert lr.layer_cost(layer, shape) == expected
    assert lr.layer_cost(layer) == dataclasses.replace(expected, macs=0)
