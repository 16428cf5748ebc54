"""Budgets: limits as fractions, counts and times."""

from __future__ import annotations

from datetime import timedelta

import pytest

import lowrank_layers as lr


def test_a_budget_of_something_else_is_refused():
    with pytest.raises(lr.BudgetError, match="of='encoder', expected 'model' or 'planned'"):
        lr.Budget(params=0.5, of="encoder")


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        (lr.Budget(params=0.3), {"params": 300}),
        (lr.Budget(macs=1.0), {"macs": 50}),
        (lr.Budget(bytes=7), {"bytes": 7}),
        (lr.Budget(bytes=0.5, params=400, loss=0.1), {"params": 400, "bytes": 2000}),
        (lr.Budget(latency=0.5), {"latency": 1.25}),
        (lr.Budget(latency=timedelta(milliseconds=20)), {"latency": 0.02}),
    ],
    ids=repr,
)
def test_a_fraction_is_one_of_the_whole_an_integer_a_count_and_a_timedelta_a_time(budget, limits):
    assert budget.limits(lr.Cost(params=1000, macs=50, bytes=4000, latency=2.5)) == limits
    assert set(budget.units) == set(limits)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"params": 1.5},
        {"bytes": 0},
        {"macs": True},
        {"params": 0.5, "macs": 2.0},
        {"latency": 2},
        {"latency": 1.5},
        {"latency": timedelta(0)},
        {"loss": 0.0},
        {"loss": float("nan")},
        {"loss": "0.1"},
    ],
    ids=str,
)
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(lr.BudgetError, match="expected"):
        lr.Budget(**limits)


def test_it_prints_as_it_is_written():
    assert str(lr.Budget(params=0.3)) == "Budget(params=0.3)"
    assert repr(lr.Budget(bytes=4_000_000, of="planned")) == "Budget(bytes=4000000, of='planned')"
    assert repr(lr.Budget(loss=0.1, macs=0.5)) == "Budget(macs=0.5, loss=0.1)"
