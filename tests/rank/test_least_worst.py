"""The least of the largest error under a budget, against enumeration."""

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from lowrank_layers.errors import BudgetError
from lowrank_layers.rank.least_worst import allocate_least_worst

option = st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]))
layers = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(layers, st.integers(1, 120))
def test_no_feasible_choice_has_a_smaller_largest_error(options, capacity):
    costs = [[cost for cost, _ in row] for row in options]
    errors = [[error for _, error in row] for row in options]
    every = itertools.product(*(range(len(row)) for row in options))
    cost = [(sum(costs[k][i] for k, i in enumerate(picks)), picks) for picks in every]
    feasible = [max(errors[k][i] for k, i in enumerate(picks)) for total, picks in cost if total <= capacity]
    if not feasible:
        with pytest.raises(BudgetError, match="the smallest options cost"):
            allocate_least_worst(costs, errors, capacity)
        return
    picks = allocate_least_worst(costs, errors, capacity)
    assert sum(costs[k][i] for k, i in enumerate(picks)) <= capacity
    assert max(errors[k][i] for k, i in enumerate(picks)) == min(feasible)


def test_without_layers_nothing_is_chosen():
    assert allocate_least_worst([], [], 5) == []
