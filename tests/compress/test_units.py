"""Units in which layers are compared: without a loss, no worse than one ratio for all layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.data import accuracy, available, lenet, mnist

SVD = [lr.SVDMethod()]


@pytest.fixture
def model() -> nn.Module:
    """Every second layer has a unit with huge values, which owns the energy and which the tanh after it saturates."""
    torch.manual_seed(0)
    layers = [nn.Linear(48, 48) for _ in range(6)]
    with torch.no_grad():
        for k, layer in enumerate(layers):
            u, _, vh = torch.linalg.svd(torch.randn(48, 48))
            layer.weight.copy_(u * torch.logspace(0.5, -1, 48) @ vh)
            if k % 2:
                layer.weight[0] *= 100
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).requires_grad_(False)


def uniform_and(model, stats, fraction, **kwargs):
    """The plan with one ratio for all, and one of at most as many parameters."""
    uniform = lr.make_plan(model, rank=lr.ParameterFraction(fraction), stats=stats, methods=SVD)
    budget = lr.Budget(params=sum(entry.after.params for entry in uniform), of="planned")
    return uniform, lr.make_plan(model, budget, stats=stats, methods=SVD, **kwargs)


def error(model, plan, stats, x):
    return float(torch.dist(lr.factorize_(copy.deepcopy(model), plan, stats=stats)(x), model(x)))


@pytest.mark.parametrize("fraction", [0.7, 0.5, 0.3])
def test_a_channel_of_huge_values_does_not_cost_its_layer_everything(model, fraction):
    x = torch.randn(3000, 48)
    stats = lr.calibrate(model, [x])
    uniform, default = uniform_and(model, stats, fraction)
    relative = uniform_and(model, stats, fraction, units="relative")[1]
    assert default.settings["units"] == "trimmed"
    assert error(model, default, stats, x) <= error(model, uniform, stats, x)
    assert error(model, default, stats, x) < error(model, relative, stats, x)


KNOWN = {
    "nothing": (lambda model, x: None, "balanced"),
    "inputs": (lambda model, x: lr.calibrate(model, [x]), "trimmed"),
    "gradients": (lambda model, x: lr.calibrate(model, [x], loss=lr.SampledCrossEntropy()), "balanced"),
}


@pytest.mark.parametrize(("statistics", "units"), KNOWN.values(), ids=KNOWN)
def test_the_default_units_depend_on_what_is_known(model, statistics, units):
    stats = statistics(model, torch.randn(100, 48))
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats)
    assert plan.settings["units"] == units
    assert plan == lr.make_plan(model, lr.Budget(params=0.5), stats=stats, units=units)


def test_gradients_of_a_model_that_reads_tokens_count_as_they_are():
    words = nn.Sequential(nn.Embedding(50, 48), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 50))
    stats = lr.calibrate(words, [torch.randint(50, (8, 20))], loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(words, lr.Budget(params=0.5), stats)
    assert plan.settings["units"] == "absolute"
    assert plan == lr.make_plan(words, lr.Budget(params=0.5), stats, units="absolute")
    balanced = lr.make_plan(words, lr.Budget(params=0.5), stats, units="balanced")
    assert plan.loss <= balanced.loss


def test_trimmed_units_do_not_see_the_scale_of_a_layer_or_of_its_largest_direction():
    spectrum = torch.linspace(1, 0.2, 20)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(3)))
    with torch.no_grad():
        for scale, largest, layer in zip((1.0, 1000.0, 1.0), (1.0, 1.0, 500.0), model, strict=True):
            values = torch.cat([spectrum[:1] * largest, spectrum[1:]])
            u, v = (torch.linalg.qr(torch.randn(20, 20))[0] for _ in range(2))
            layer.weight.copy_(scale * u * values @ v)

    def ranks(units):
        plan = lr.make_plan(model, lr.Budget(params=3 * (4 * 40 + 20)), methods=SVD, units=units)
        return [entry.rank for entry in plan]

    assert ranks("trimmed") == [4, 4, 4]
    assert all(ranks(units) != [4, 4, 4] for units in ("absolute", "balanced", "relative"))


def test_unknown_units_are_refused(model):
    with pytest.raises(lr.LowRankError, match="got units 'loss', expected one of"):
        lr.make_plan(model, lr.Budget(params=0.5), units="loss")


@pytest.mark.skipif(not available("lenet_mnist"), reason="needs lenet_mnist in LOWRANK_DATA")
@pytest.mark.parametrize("known", [False, True], ids=["nothing known", "inputs known"])
def test_lenet_is_above_one_ratio_for_all(known):
    images, labels = (part[:1000] for part in mnist("test"))
    model = lenet()
    stats = lr.calibrate(model, list(mnist("train")[0][:500].split(250))) if known else None

    def right(plan: lr.Plan) -> float:
        return accuracy(lr.factorize_(copy.deepcopy(model), plan, stats=stats), images, labels)

    uniform, default = uniform_and(model, stats, 0.3)
    assert right(default) > right(uniform) + 20


@pytest.mark.parametrize("known", [False, True], ids=["nothing known", "inputs known"])
def test_layers_of_rank_one_and_of_zeros_are_planned(known):
    """Nothing is left of them once their largest direction is gone."""
    model = nn.Sequential(nn.Linear(1, 16), nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(112, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight.copy_(torch.ones(8, 4, 3))
        model[3].weight.copy_(torch.outer(torch.randn(16), torch.randn(112)))
        model[4].weight.zero_()
    stats = lr.calibrate(model, [torch.randn(50, 4, 1)]) if known else None
    plan = lr.make_plan(model, lr.Budget(params=0.3), stats=stats)
    assert plan.after.params <= 0.3 * plan.total.params
    assert all(entry.error <= 1e-4 for entry in plan if entry.name in "34")
