"""The estimated time of a plan: multiply-accumulates and values written, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.entry import MACS_PER_VALUE
from lowrank_layers.layers import layer_writes


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16))


@pytest.fixture
def stats(model: nn.Module) -> lr.Statistics:
    return lr.calibrate(model, [torch.randn(20, 6, 8, 8)], loss=lr.SampledCrossEntropy())


def test_the_estimate_counts_products_and_values_written(model, stats):
    plan = lr.make_plan(model, rank=2, stats=stats, methods=[lr.SVDMethod()])
    values = 8 * 16, 2 * 16 + 8 * 16  # [8, 4, 4]; behind the first part [2, 4, 4]
    conv = (8 * 16 * 54 + MACS_PER_VALUE * values[0], 2 * 16 * 54 + 8 * 16 * 2 + MACS_PER_VALUE * values[1])
    linear = (128 * 16 + MACS_PER_VALUE * 16, 128 * 2 + 2 * 16 + MACS_PER_VALUE * (2 + 16))
    assert plan["0"].time() == conv
    assert plan["3"].time() == linear
    assert plan.time_ratio == pytest.approx((conv[1] + linear[1]) / (conv[0] + linear[0]))


@pytest.mark.parametrize("method", [lr.SVDMethod(), lr.TuckerMethod(), lr.CPMethod(), lr.SpatialMethod()])
def test_the_values_written_are_those_of_the_parts(model, stats, method):
    layer = lr.Candidate(model[0], stats["0"])
    built = method.build(layer, method.options(layer)[-1].rank)
    x = torch.randn(1, 6, 8, 8)
    written = 0
    for part in built.parts:
        x = part(x)
        written += x.numel()
    assert layer_writes(built, (6, 8, 8)) == written


def test_a_slower_plan_says_so(model, stats):
    plan = lr.make_plan(model, rank=40, stats=stats, methods=[lr.CPMethod()])
    assert plan.time_ratio > 1
    assert f"warning: these layers are estimated to take {plan.time_ratio:.1f} times" in str(plan)
    assert "warning" not in str(plan.drop("0"))
    assert plan.time_ratio == 1


def test_a_faster_plan_says_nothing(model, stats):
    plan = lr.make_plan(model, rank=2, stats=stats, skip=["0"])
    assert plan.time_ratio < 1
    assert "warning" not in str(plan)


def test_without_statistics_no_time_is_known(model):
    plan = lr.make_plan(model, rank=40)
    assert plan.time_ratio is None
    assert "warning" not in str(plan)


def test_the_estimate_survives_the_file(model, stats):
    plan = lr.make_plan(model, rank=3, stats=stats)
    assert lr.Plan.from_json(plan.to_json()).time_ratio == plan.time_ratio
