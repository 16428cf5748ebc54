"""Elimination: losses that add up to that of the best map on the columns that stay."""

import itertools

import pytest
import torch

from lowrank_layers.compress.hidden_units.eliminate import eliminate, map_from
from lowrank_layers.compress.regression import Metric, Regression


def problem(outputs: int, inputs: int) -> Regression:
    rows = max(200, 2 * inputs)
    x, g = torch.randn(rows, inputs, dtype=torch.float64), torch.randn(rows, outputs, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, dtype=torch.float64)
    return Regression(
        torch.randn(outputs, inputs, dtype=torch.float64),
        None,
        Metric(g.mT @ g / rows),
        Metric(x.mT @ x / rows),
        scale=3.0,
    )


def loss_of(regression: Regression, columns: torch.Tensor) -> float:
    full = torch.zeros_like(regression.weight)
    full[:, columns] = map_from(regression, columns)
    return regression.loss(full)


@pytest.mark.parametrize("area", [1, 3])
def test_growths_add_up_to_the_loss_of_the_best_map_on_the_units_that_stay(area):
    regression, count = problem(5, 6 * area), 6
    found = eliminate(regression, count)
    columns = torch.arange(count * area).unflatten(0, (count, area))
    assert len(found.units) == count - 1
    for gone in range(1, count):
        stay = sorted({*range(count)} - {*found.units[:gone]})
        total = sum(found.growth[:gone])
        assert total == pytest.approx(loss_of(regression, columns[stay].flatten()), rel=1e-6)


def test_the_first_unit_that_goes_is_the_best_one():
    regression = problem(4, 7)
    losses = [loss_of(regression, torch.tensor(stay)) for stay in itertools.combinations(range(7), 6)]
    assert eliminate(regression, 7).units[0] == 6 - losses.index(min(losses))


def test_the_map_is_the_least_squares_solution():
    """No other map on the same columns has less loss: the gradient there is zero."""
    regression, columns = problem(3, 5), torch.tensor([0, 2, 3])
    best = map_from(regression, columns)
    least = loss_of(regression, columns)
    for _ in range(5):
        moved = torch.zeros_like(regression.weight)
        moved[:, columns] = best + 1e-3 * torch.randn_like(best)
        assert regression.loss(moved) > least


def test_units_that_others_predict_exactly_go_first_and_cost_nothing():
    x = torch.randn(100, 3, dtype=torch.float64)
    x = torch.cat([x, x @ torch.randn(3, 2, dtype=torch.float64)], 1)
    moment = x.mT @ x / 100 + 1e-10 * torch.eye(5)
    regression = Regression(torch.randn(4, 5, dtype=torch.float64), None, Metric.identity(4, x.device), Metric(moment))
    found = eliminate(regression, 5)
    assert max(found.growth[:2]) < 1e-6 * regression.energy
    assert found.growth[2] > 1e-3 * regression.energy


def test_many_units_go_several_at_a_time_and_their_growths_still_add_up():
    regression, count = problem(6, 300), 300
    found = eliminate(regression, count)
    assert sorted([*found.units, *({*range(count)} - {*found.units})]) == list(range(count))
    assert found.growth[0] == found.growth[1] != found.growth[2]  # a 128th of 300, and again a 128th of 298
    for gone in (2, 100, 290):
        stay = sorted({*range(count)} - {*found.units[:gone]})
        assert sum(found.growth[:gone]) == pytest.approx(loss_of(regression, torch.tensor(stay)), rel=1e-6)
