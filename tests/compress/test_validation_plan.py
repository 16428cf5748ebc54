"""Ranks by the measured score of one compressed layer at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.isotonic import isotonic_regression
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.isotonic import rising

from .test_alds import planted


def output_error(dense: nn.Module, inputs: torch.Tensor):
    expected = dense(inputs).detach()
    return lambda model: -((model(inputs) - expected).norm() / expected.norm()).item()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12))
def test_monotone_scores_are_those_of_scikit_learn(values):
    assert rising(values) == pytest.approx(list(isotonic_regression(np.array(values))), abs=1e-9)


def test_planted_ranks_are_recovered():
    """Ranks 4 and 12 of 40, in a tail of a thousandth; a ratio of k / 20 of the parameters is rank k."""
    model = nn.Sequential(planted(4, 0, 1e-3), nn.ReLU(), planted(12, 1, 1e-3))
    score = output_error(model, torch.randn(100, 40))
    ratios = [k / 20 for k in (2, 4, 8, 12, 16)]
    plan = lr.plan_by_validation(model, lr.Budget(params=0.5), score, ratios=ratios)
    assert [entry.rank for entry in plan] == [4, 12]


def test_the_threshold_is_the_highest_that_fits():
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 20))
    score = output_error(model, torch.randn(100, 30))
    ratios = (0.2, 0.4, 0.6, 0.8)
    plan = lr.plan_by_validation(model, lr.Budget(params=0.6), score, ratios=ratios)
    assert plan.after.params <= 0.6 * plan.total.params

    def alone(entry):
        return score(lr.factorize_(copy.deepcopy(model), lr.Plan([entry])))

    worst = min(alone(entry) for entry in plan)
    dearer = 0
    for entry in plan:
        options = [lr.make_plan(model, rank=lr.ParameterFraction(ratio))[entry.name] for ratio in ratios]
        better = [option.after.params for option in options if alone(option) > worst]
        dearer += min([*better, entry.before.params])
    assert dearer > 0.6 * plan.total.params


def test_the_model_and_the_generator_stay_as_they_are():
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    lr.plan_by_validation(model, lr.Budget(params=0.5), lambda found: 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_the_score_never_falls_every_layer_becomes_as_small_as_the_ratios():
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    plan = lr.plan_by_validation(model, lr.Budget(params=0.9), lambda found: 1.0, ratios=(0.1, 0.5))
    assert [entry.rank for entry in plan] == [2, 2]


def test_statistics_skip_methods_and_units_of_the_budget():
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 20))
    inputs = torch.randn(100, 30)
    stats = lr.calibrate(model, [inputs], loss=lr.SampledCrossEntropy())
    plan = lr.plan_by_validation(
        model, lr.Budget(macs=0.7), output_error(model, inputs), stats=stats, methods=[lr.SVDMethod()], skip=["0"]
    )
    assert plan.after.macs <= 0.7 * plan.total.macs
    assert "0" not in plan
    assert plan.damping == lr.Damping()
    lr.factorize_(model, plan, stats=stats)


@pytest.mark.parametrize("answer", [None, float("nan"), "good"], ids=repr)
def test_a_score_that_is_no_number_is_refused(answer):
    with pytest.raises(lr.LowRankError, match=r"^plan_by_validation: the score returned .*expected a finite number"):
        lr.plan_by_validation(nn.Sequential(nn.Linear(9, 9)), lr.Budget(params=0.5), lambda model: answer)


def test_bad_budgets_and_ratios_are_refused():
    model = nn.Sequential(nn.Linear(40, 40))
    for budget, ratios, text in (
        (0.5, (0.5,), "expected a Budget"),
        (lr.Budget(macs=0.5), (0.5,), "a budget of MACs needs stats"),
        (lr.Budget(params=0.5), (), "got no ratios"),
        (lr.Budget(params=0.5), (1.5,), "expected a number in"),
        (lr.Budget(params=0.1), (0.5,), "the smallest options cost"),
    ):
        with pytest.raises(lr.LowRankError, match=text):
            lr.plan_by_validation(model, budget, lambda found: 0.0, ratios=ratios)
