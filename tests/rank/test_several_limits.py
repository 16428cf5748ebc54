"""Several limits at once: all are kept, and the loss is close to its bound, that of the linear relaxation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import lowrank_layers as lr
from lowrank_layers.rank import allocate
from lowrank_layers.rank.several_limits import allocate_within


def problem(layers: int, options: int, limits: int, seed: int) -> tuple[list, list]:
    """Losses that fall along the options, with costs that rise, in each unit at a pace of its own."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(limits, layers, options, generator=generator, dtype=torch.float64) + 0.1
    costs = steps.cumsum(-1) * torch.rand(limits, layers, 1, generator=generator, dtype=torch.float64).exp()
    decay = 1 + 6 * torch.rand(layers, 1, generator=generator, dtype=torch.float64)
    losses = torch.exp(-decay * torch.linspace(0, 1, options, dtype=torch.float64)) - torch.exp(-decay)
    return costs.tolist(), losses.tolist()


def totals(costs: list, picks: list[int]) -> list[float]:
    return [sum(layer[pick] for layer, pick in zip(one, picks, strict=True)) for one in costs]


def relaxation(costs: list, losses: list, capacities: list[float]) -> float:
    """The least loss when options may be mixed, by linear programming."""
    layers, options = len(losses), len(losses[0])
    one_each = np.kron(np.eye(layers), np.ones(options))
    flat = [[cost for layer in one for cost in layer] for one in costs]
    return linprog(np.ravel(losses), flat, capacities, one_each, np.ones(layers)).fun


@pytest.mark.parametrize("limits", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_all_limits_hold_and_the_loss_is_close_to_the_bound(limits, seed):
    costs, losses = problem(layers=12, options=40, limits=limits, seed=seed)
    # each limit at the same part of its range: none of them makes the others idle
    capacities = [0.5 * sum(layer[-1] for layer in one) for one in costs]
    picks = allocate_within(costs, losses, capacities)
    assert all(total <= limit * (1 + 1e-9) for total, limit in zip(totals(costs, picks), capacities, strict=True))
    found = sum(layer[pick] for layer, pick in zip(losses, picks, strict=True))
    assert found <= 1.03 * relaxation(costs, losses, capacities)


def test_where_one_limit_binds_the_choice_is_exact():
    costs, losses = problem(layers=5, options=5, limits=2, seed=0)
    capacities = [0.4 * sum(layer[-1] for layer in costs[0]), 100 * sum(layer[-1] for layer in costs[1])]
    picks = allocate_within(costs, losses, capacities)
    choices = [choice for choice in product(range(5), repeat=5) if totals(costs, choice)[0] <= capacities[0]]
    best = min(choices, key=lambda choice: sum(layer[k] for layer, k in zip(losses, choice, strict=True)))
    assert picks == list(best)


def test_one_limit_on_integers_is_the_knapsack():
    costs, losses = [[[1, 5], [2, 6]]], [[3.0, 0.0], [10.0, 0.0]]
    assert allocate_within(costs, losses, [7]) == allocate(costs[0], losses, 7)


def test_limits_that_exclude_each_other_are_refused():
    # the option that is cheap in one unit is dear in the other
    costs = [[[1, 9]] * 3, [[9, 1]] * 3]
    with pytest.raises(lr.BudgetError, match="no choice was found that meets all"):
        allocate_within(costs, [[1.0, 1.0]] * 3, [4, 4])
    with pytest.raises(lr.BudgetError, match="leave nothing"):
        allocate_within(costs, [[1.0, 1.0]] * 3, [0, 4])
