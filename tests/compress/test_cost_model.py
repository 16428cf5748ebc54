"""A cost that is no count is one class with one method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from torch import nn

import lowrank_layers as lr

MODEL = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Embedding(300, 48))


@dataclass(frozen=True)
class Tiled(lr.CountedCost):
    """Multiplications in tiles: a factor's inner dimension is filled up to a multiple of the tile."""

    affine: ClassVar[bool] = False
    tile: int = 8

    def cost(self, layer: nn.Module, stats: lr.LayerStats | None) -> lr.Cost:
        cost = super().cost(layer, stats)
        if not isinstance(layer, lr.FactoredModule):
            return cost
        filled = -(-layer.rank // self.tile) * self.tile
        return replace(cost, bytes=cost.bytes * filled // layer.rank)


@dataclass(frozen=True)
class Bits(lr.CountedCost):
    """Dense and factored weights of ``bits`` bits."""

    bits: int = 8

    def cost(self, layer: nn.Module, stats: lr.LayerStats | None) -> lr.Cost:
        cost = super().cost(layer, stats)
        return replace(cost, bytes=cost.params * self.bits // 8)


@pytest.mark.parametrize("cost_model", [lr.CountedCost(), Bits(), Tiled()], ids=repr)
def test_every_option_costs_what_the_model_says_of_the_built_layer(cost_model):
    for module in (MODEL[0], MODEL[4]):
        layer = lr.Candidate(module, cost_model=cost_model)
        for option in lr.SVDMethod().options(layer)[::5]:
            assert option.cost == cost_model.cost(lr.SVDMethod().build(layer, option.rank), None)


def test_the_budget_is_one_of_the_costs_that_the_model_gives():
    plan = lr.make_plan(MODEL, lr.Budget(bytes=0.5), cost_model=Tiled(), methods=[lr.SVDMethod()])
    counted = lr.make_plan(MODEL, lr.Budget(bytes=0.5), methods=[lr.SVDMethod()])
    assert plan.after.bytes <= 0.5 * plan.total.bytes
    # a rank that does not fill its tile costs as much as the one that does
    assert all(entry.rank is None or entry.rank % 8 == 0 for entry in plan)
    assert any(entry.rank is not None and entry.rank % 8 for entry in counted)


def test_the_whole_model_is_priced_by_it_where_it_is_planned_and_counted_elsewhere():
    plan = lr.make_plan(MODEL, lr.Budget(bytes=0.95), cost_model=Bits(), skip=["4"])
    planned = 2 * 48 * 64 + 48 + 64
    assert plan.total.bytes == planned + 4 * 300 * 48


class NoCost:
    affine = True


def test_what_prices_nothing_is_refused():
    with pytest.raises(lr.LowRankError, match="expected a CostModel such as CountedCost"):
        lr.make_plan(MODEL, lr.Budget(bytes=0.5), cost_model=NoCost())
