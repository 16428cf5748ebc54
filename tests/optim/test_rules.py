"""Rank rules, which look at the first gradient."""

import math

import pytest
import torch

import lowrank_layers as lr
from tests.contracts.tables import RULES, spectrum

from .common import METHODS, one


@pytest.mark.parametrize("row", RULES, ids=lambda row: row.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (6, 4, 3, 3)])
def test_a_rule_means_the_rank_that_it_finds_in_the_first_gradient(row, method, shape):
    first, second = one(shape), one(shape)
    first.grad = second.grad = one(shape, seed=3).grad * 0.7 ** torch.arange(shape[-1])
    rank = row.rule(spectrum(first.grad.flatten(1)))
    steps = []
    for p, given in ((first, row.rule), (second, rank)):
        optimizer = lr.LowRankProjection(torch.optim.SGD([p], lr=0.1), given, method=method)
        before = p.detach().clone()
        optimizer.step()
        steps.append(p.detach() - before)
    assert torch.linalg.matrix_rank(steps[0].flatten(1)) == rank
    torch.testing.assert_close(steps[0], steps[1])


def test_parameter_fraction_is_that_of_a_pair():
    p = one((30, 50))
    optimizer = lr.LowRankProjection(torch.optim.Adam([p]), lr.ParameterFraction(0.25))
    optimizer.step()
    rank = int(0.25 * 30 * 50 / 80)
    assert optimizer.state_dict()["state"][0]["projector"].shape == (30, rank)
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (rank, 50)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_rule_waits_for_a_gradient_that_says_something(bad):
    p, late = one(), one()
    late.grad = p.grad.clone()
    good, p.grad = p.grad, torch.full_like(p, bad)
    optimizers = [
        lr.LowRankProjection(torch.optim.AdamW([q], lr=0.1, weight_decay=0.1), lr.Energy(0.6)) for q in (p, late)
    ]
    optimizers[0].step()
    torch.testing.assert_close(p, 0.99 * late)  # it decays, as a parameter with a gradient of zeros does
    late.data.copy_(p.data)
    p.grad = good
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(p, late)
