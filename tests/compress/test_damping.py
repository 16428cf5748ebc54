"""Damping is a setting of the plan: it weights the estimates, and the layers that are built."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.damping import TOKENS as SHARE, UNITS


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 10))


@pytest.fixture
def stats(model) -> lr.Statistics:
    return lr.calibrate(model, [torch.randn(200, 24) @ torch.randn(24, 24)], loss=lr.SampledCrossEntropy())


def test_under_infinitely_strong_damping_the_plain_weight_is_approximated(model, stats):
    strong = lr.Damping(inputs=1e12, outputs=1e12)
    plan = lr.make_plan(model, rank=5, stats=stats, damping=strong)
    plain = lr.factorize_(copy.deepcopy(model), lr.make_plan(model, rank=5))
    built = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    default = lr.factorize_(copy.deepcopy(model), lr.make_plan(model, rank=5, stats=stats), stats=stats)
    for k in (0, 2):
        assert torch.allclose(built[k].weight, plain[k].weight, atol=1e-5)
        assert not torch.allclose(default[k].weight, plain[k].weight, atol=1e-3)


def test_the_weighted_problem_has_the_ridges(model, stats):
    def moments(damping):
        (problem,) = lr.Candidate(model[0], stats["0"], damping=damping).problems
        return problem.inputs.matrix, problem.outputs.matrix

    found, plain = moments(lr.Damping(inputs=0.5, outputs=0.25)), moments(lr.Damping(inputs=0, outputs=0))
    shrunk = moments(lr.Damping(inputs=0.5, outputs=0.25, input_shrinkage=0.2, output_shrinkage=0.7))
    for ridge, share, damped, other, raw in zip((0.5, 0.25), (0.2, 0.7), found, shrunk, plain, strict=True):
        added = ridge * raw.diagonal().mean() * torch.eye(len(raw), dtype=raw.dtype)
        assert torch.allclose(damped, raw + added)
        assert torch.allclose(other, (1 - share) * raw + share * torch.diag(raw.diagonal()) + added)
        assert torch.allclose(other.diagonal(), damped.diagonal())


def test_a_ridge_is_a_shrinkage_towards_the_scaled_identity(model, stats):
    """``A + a m I`` is ``(1 + a)`` times the shrunk moment, and a factor of all layers changes nothing."""
    ridges, shrinkages = lr.Damping(inputs=0.25, outputs=0.6), (0.25 / 1.25, 0.6 / 1.6)

    def shrunk(moment, share):
        mean = moment.diagonal().mean()
        return (1 - share) * moment + share * mean * torch.eye(len(moment), dtype=moment.dtype)

    def replaced(layer):
        mean = layer.inputs.mean
        second = shrunk(layer.inputs.covariance(), shrinkages[0]) + torch.outer(mean, mean)
        gradients = shrunk(layer.gradients, shrinkages[1])
        return layer.changed(inputs=replace(layer.inputs, second=second), gradients=gradients)

    other = replace(stats, layers={name: replaced(layer) for name, layer in stats.items()})
    built, plans = [], []
    for own, damping in ((stats, ridges), (other, lr.Damping(inputs=0, outputs=0))):
        plans.append(lr.make_plan(model, lr.Budget(params=0.5), stats=own, damping=damping))
        built.append(lr.factorize_(copy.deepcopy(model), plans[-1], stats=own))
    assert [entry.rank for entry in plans[0]] == [entry.rank for entry in plans[1]]
    for k in (0, 2):
        assert torch.allclose(built[0][k].weight, built[1][k].weight, atol=1e-5)


def test_the_plan_keeps_it_in_its_file(model, stats, tmp_path):
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats, damping=lr.Damping(inputs=0.01))
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json").damping == lr.Damping(inputs=0.01, outputs=0.1)
    assert lr.make_plan(model, lr.Budget(params=0.5), stats=stats).damping == lr.Damping()


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), None])
def test_a_shrinkage_is_below_one(value):
    with pytest.raises(lr.LowRankError, match=r"got input_shrinkage=.*, expected a number of at least 0 and below 1"):
        lr.Damping(input_shrinkage=value)


@pytest.mark.parametrize("damage", [{"inputs": -1}, {"inputs": "much"}, {"surprise": 1}])
def test_a_file_with_another_damping_is_refused(model, stats, damage):
    body = json.loads(lr.make_plan(model, lr.Budget(params=0.5), stats=stats).to_json())
    body["settings"]["damping"] = damage
    with pytest.raises(lr.LowRankError, match="plan: "):
        lr.Plan.from_json(json.dumps(body))


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), True, "much", None])
def test_a_ridge_is_a_finite_number_that_is_not_negative(value):
    with pytest.raises(lr.LowRankError, match="Damping: got outputs="):
        lr.Damping(outputs=value)


def test_a_number_is_no_damping(model):
    with pytest.raises(lr.LowRankError, match=r"got damping=0\.1, expected a Damping"):
        lr.make_plan(model, lr.Budget(params=0.5), damping=0.1)


class Words(nn.Module):
    """A model that reads tokens, an image, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pixels, self.head = nn.Embedding(50, 16), nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, ids=None, image=None, labels=None):
        x = 0 if ids is None else self.words(ids)
        return self.head(x if image is None else x + self.pixels(image))


TOKENS, IMAGE, CLASSES = torch.randint(50, (4, 6)), torch.randn(4, 6, 8), torch.randint(10, (4, 6))
READ = {
    "tokens": (TOKENS, True),
    "tokens of 32 bits": ({"ids": TOKENS.int()}, True),
    "tokens and an image": ({"ids": TOKENS, "image": IMAGE}, True),
    "an image": ({"image": IMAGE}, False),
    "an image with labels": ({"image": IMAGE, "labels": CLASSES}, False),
}


@pytest.mark.parametrize(("batch", "reads"), READ.values(), ids=READ)
def test_moments_of_models_that_read_tokens_are_shrunk_by_default(batch, reads):
    model = Words()
    stats = lr.calibrate(model, [batch], loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, rank=3, stats=stats)
    assert plan.damping == lr.Damping.default(stats)
    shrunk = lr.Damping(input_shrinkage=SHARE, output_shrinkage=SHARE, units=UNITS)
    assert plan.damping == (shrunk if reads else lr.Damping())
    assert lr.make_plan(model, rank=3, stats=stats, damping=lr.Damping()).damping == lr.Damping()


def test_the_target_of_a_tuple_is_no_token(model):
    x, y = torch.randn(20, 24), torch.randint(10, (20,))
    stats = lr.calibrate(model, [(x, y)], loss=nn.functional.cross_entropy)
    assert not stats.reads_tokens
    assert lr.Damping.default(stats) == lr.Damping.default(None) == lr.Damping()
