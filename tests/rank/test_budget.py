"""Budgets: one limit, as a fraction or a count."""

from __future__ import annotations

import pytest

import lowrank_layers as lr


def test_a_budget_of_something_else_is_refused():
    with pytest.raises(lr.BudgetError, match="of='encoder', expected 'model' or 'planned'"):
        lr.Budget(params=0.5, of="encoder")


@pytest.mark.parametrize(
    ("budget", "limit"), [(lr.Budget(params=0.3), 300), (lr.Budget(macs=1.0), 50), (lr.Budget(bytes=7), 7)]
)
def test_a_fraction_is_one_of_the_whole_and_an_integer_a_count(budget, limit):
    assert budget.limit(lr.Cost(params=1000, macs=50, bytes=4000)) == limit


@pytest.mark.parametrize(
    "limits", [{}, {"params": 0.3, "macs": 0.3}, {"params": 1.5}, {"bytes": 0}, {"macs": True}], ids=str
)
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(lr.BudgetError, match="expected"):
        lr.Budget(**limits)


def test_it_prints_as_it_is_written():
    assert str(lr.Budget(params=0.3)) == "Budget(params=0.3)"
    assert repr(lr.Budget(bytes=4_000_000, of="planned")) == "Budget(bytes=4000000, of='planned')"
