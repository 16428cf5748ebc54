"""The multiple-choice knapsack: exact against enumeration and dynamic programming, within the dual bound at scale."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lowrank_layers.errors import BudgetError
from lowrank_layers.rank import allocate

option = st.tuples(st.integers(1, 40), st.floats(0, 100, allow_nan=False))
layers = st.lists(st.lists(option, min_size=1, max_size=6), min_size=1, max_size=5)


def chosen(values, picks):
    return sum(row[k] for row, k in zip(values, picks, strict=True))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(layers, st.integers(1, 150))
def test_no_feasible_choice_loses_less(options, capacity):
    costs = [[cost for cost, _ in row] for row in options]
    losses = [[loss for _, loss in row] for row in options]
    every = itertools.product(*(range(len(row)) for row in options))
    feasible = [chosen(losses, picks) for picks in every if chosen(costs, picks) <= capacity]
    if not feasible:
        with pytest.raises(BudgetError):
            allocate(costs, losses, capacity)
        return
    picks = allocate(costs, losses, capacity)
    assert chosen(costs, picks) <= capacity
    assert chosen(losses, picks) <= min(feasible) * (1 + 1e-8) + 1e-12


def least_loss(costs, losses, capacity):
    """Dynamic programming over every integer amount that may be spent."""
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    for row, values in zip(costs, losses, strict=True):
        following = torch.full_like(best, torch.inf)
        for cost, loss in zip(row, values, strict=True):
            following[cost:] = torch.minimum(following[cost:], best[: capacity + 1 - cost] + loss)
        best = following
    return float(best[capacity])


@pytest.mark.parametrize("capacity", [500, 1111, 2500])
def test_fifty_layers_of_forty_options_that_follow_no_pattern(capacity):
    generator = torch.Generator().manual_seed(capacity)
    costs = (torch.randint(1, 100, (50, 40), generator=generator)).tolist()
    losses = torch.rand(50, 40, generator=generator, dtype=torch.float64).tolist()
    picks = allocate(costs, losses, capacity)
    assert chosen(costs, picks) <= capacity
    assert chosen(losses, picks) == pytest.approx(least_loss(costs, losses, capacity), rel=1e-9)


def test_beats_the_greedy_choice():
    """Greedy by slope takes the first step and blocks the second; the optimum takes the second one."""
    assert allocate([[0, 6], [0, 10]], [[7.0, 0.0], [11.0, 0.0]], 10) == [0, 1]


def test_many_layers_with_many_options_are_within_one_step_of_the_dual_bound():
    """200 layers of 1,000 options. A price on cost bounds every feasible choice from below (Lagrange)."""
    steps = torch.tensor([7 + i % 5 for i in range(200)], dtype=torch.float64)
    costs = steps[:, None] * torch.arange(1, 1001)
    losses = torch.tensor([1.0 + i % 7 for i in range(200)], dtype=torch.float64)[:, None] / torch.arange(1, 1001)
    capacity = 200 * 300
    low, high = 0.0, 1.0
    for _ in range(60):
        price = (low + high) / 2
        at = (losses + price * costs).argmin(1, keepdim=True)
        low, high = (price, high) if float(costs.gather(1, at).sum()) > capacity else (low, price)
    bound = float((losses + high * costs).min(1).values.sum()) - high * capacity
    counts, lost = costs.long().tolist(), losses.tolist()
    picks = allocate(counts, lost, capacity)
    assert chosen(counts, picks) <= capacity
    assert bound <= chosen(lost, picks) <= bound + high * float(steps.max())


def test_without_layers_nothing_is_chosen():
    assert allocate([], [], 5) == []


def test_a_budget_below_the_smallest_options_says_what_they_cost():
    with pytest.raises(BudgetError, match="the smallest options cost 30 together, but only 29 are left"):
        allocate([[10, 50], [20]], [[1.0, 0.0], [1.0]], 29)
