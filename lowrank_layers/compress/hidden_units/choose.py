"""Choosing the hidden units that stay: what they cost, what they are good for, and how few there may be."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from ...errors import BudgetError
from ...layers import FactoredModule, bias_of, weight_of
from ...layers.config import FactoredSpec, blank
from .eliminate import Elimination
from .find import HiddenUnits


def choose_units(
    modules: Mapping[str, nn.Module],
    orders: Mapping[HiddenUnits, Elimination],
    least: Mapping[HiddenUnits, int],
    excess: int,
    *,
    uniform: bool = False,
) -> dict[HiddenUnits, list[int]]:
    """Returns the units that stay, of the groups from which some go.

    Again and again the unit goes that adds the least loss per parameter, until so many are saved.

    Args:
        modules: the modules of the model.
        orders: in which order the units of each group go.
        least: how many of them have to stay.
        excess: how many parameters have to be saved.
        uniform: whether groups beside layers of the same sizes lose as many units, one of each at a time.

    Raises:
        BudgetError: if they cannot be.
    """
    costs = _Costs(modules, orders)
    gone = dict.fromkeys(orders, 0)
    bundles = _alike(modules, orders) if uniform else [[group] for group in orders]

    def price(bundle: list[HiddenUnits]) -> float:
        growth = sum(orders[group].growth[gone[group]] for group in bundle)
        return growth / sum(map(costs.of_unit, bundle))

    while excess > 0:
        left = [bundle for bundle in bundles if all(group.count - gone[group] > least[group] for group in bundle)]
        if not left:
            raise BudgetError(
                f"remove_units_: {excess:,} parameters too many are left without all hidden units that can go, expected"
                " a larger budget; factorize the model to fewer parameters first."
            )
        for group in min(left, key=price):
            excess -= costs.of_unit(group)
            costs.remove(group)
            gone[group] += 1
    stay = {group: {*range(group.count)} - {*orders[group].units[:number]} for group, number in gone.items()}
    return {group: sorted(units) for group, units in stay.items() if gone[group]}


def least_units(layer: FactoredModule, side: str, count: int) -> int:
    """Returns the least number of units at which a low-rank layer has the rank that it has now.

    Args:
        layer: the layer.
        side: ``"in"`` if it reads the units, ``"out"`` if they are its outputs.
        count: how many there are.
    """
    spec = FactoredSpec.of(layer)
    key = next(key for key in (f"{side}_features", f"{side}_channels") if key in spec.dense)
    area = spec.dense[key] // count

    def keeps_rank(units: int) -> bool:
        smaller = replace(spec, dense={**spec.dense, key: units * area})
        return bool(smaller.like(blank(smaller.dense)).rank == layer.rank)

    return 1 + bisect_left(range(1, count), True, key=keeps_rank)


def _alike(modules: Mapping[str, nn.Module], groups: Iterable[HiddenUnits]) -> list[list[HiddenUnits]]:
    """Groups by the kinds and sizes of the layers beside them."""
    found: dict[tuple[object, ...], list[HiddenUnits]] = {}
    for group in groups:
        layers = [modules[name] for name in group.layers]
        shapes = [tuple(tuple(p.shape) for p in layer.parameters()) for layer in layers]
        found.setdefault((group.count, *zip(map(type, layers), shapes, strict=True)), []).append(group)
    return list(found.values())


class _Costs:
    """Counts the parameters that hidden units cost, while they go one by one.

    Args:
        modules: the modules of a model.
        groups: its hidden units.
    """

    def __init__(self, modules: Mapping[str, nn.Module], groups: Iterable[HiddenUnits]) -> None:
        self._count = {group: group.count for group in groups}
        self._reads = {group.consumer: group for group in groups}
        self._makes = {name: group for group in groups for name in group.producers}
        self._modules = modules

    def of_unit(self, group: HiddenUnits) -> int:
        """Returns the number of parameters that go with one more unit of a group."""
        rows = sum(self._row(name) for name in group.producers)
        norms = sum(p.numel() for name in group.norms for p in self._modules[name].parameters()) // group.count
        weight = weight_of(self._modules[group.consumer])
        made = self._makes.get(group.consumer)
        readers = len(weight) if made is None else self._count[made]
        return rows + norms + readers * (weight[0].numel() // group.count)

    def remove(self, group: HiddenUnits) -> None:
        """Takes one unit of a group away."""
        self._count[group] -= 1

    def _row(self, name: str) -> int:
        """The parameters of one output of a layer."""
        layer = self._modules[name]
        read, columns = self._reads.get(name), weight_of(layer)[0].numel()
        if read is not None:
            columns = columns // read.count * self._count[read]
        return columns + (bias_of(layer) is not None)
