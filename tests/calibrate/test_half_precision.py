"""Moments of half-precision models: those of the model in fp32, whatever the scale of values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 200))


def off(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096), (4096,), (4, 1024)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_a_mean_over_4096_positions_keeps_its_gradients(dtype, shape, scale, how):
    model = net().to(dtype)
    exact = copy.deepcopy(model).float()
    x, y = torch.randn(*shape, 32).to(dtype), torch.randint(200, shape)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(output.flatten(0, -2).float(), target.flatten())

    expected = lr.calibrate(exact, [(x.float(), y)], loss=loss)
    if how == "weights":
        stats = lr.calibrate(model, [(x, y)], loss=loss)
    else:
        with torch.autocast("cpu", dtype):
            stats = lr.calibrate(exact, [(x.float(), y)], loss=loss)
    for name, want in expected.items():
        assert off(stats[name].gradients, want.gradients) < TOLERANCE[dtype]
        assert off(stats[name].inputs.second, want.inputs.second) < TOLERANCE[dtype]


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_weight_gradients_in_fp16_do_not_vanish(how):
    model = net().half()
    exact = copy.deepcopy(model).float()
    x, y = torch.randn(4096, 32).half(), torch.randint(200, (4096,))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 1e-3 * F.cross_entropy(output.float(), target)

    expected = lr.weight_gradients(exact, [(x.float(), y)], loss)
    if how == "weights":
        found = lr.weight_gradients(model, [(x, y)], loss)
    else:
        with torch.autocast("cpu", torch.float16):
            found = lr.weight_gradients(exact, [(x.float(), y)], loss)
    for name, want in expected.items():
        assert off(found[name], want) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_still_found(value):
    x = torch.randn(10, 32)
    x[3, 4] = value
    with pytest.raises(lr.LowRankError, match="NaN or Inf"):
        lr.calibrate(net(), [x])
