"""Groups of layers in planning: how many units may stay, what that costs each layer, and what it loses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any

from torch import nn

from ..cost import Cost
from ..errors import LowRankError
from ..layers import bias_of, layer_cost
from ..layers.config import Spec, blank, describe
from ..linalg import full_precision
from .candidates import Candidate
from .effects import Effects
from .entry import Entry
from .group_method import Choices, LayerGroup
from .measured import SHARE, VISIBLE
from .method import spread
from .request import Request

STEPS = 64
"""About so many numbers of units are offered."""


@dataclass(frozen=True)
class Member:
    """A group of layers with the name of the method that changes it.

    Args:
        method: the method's name.
        group: the group.
        layers: what planning knows of its layers, those that no single method takes left out.
        specs: the settings of all of its layers.
        before: what these cost.
    """

    method: str
    group: LayerGroup
    layers: Mapping[str, Candidate]
    specs: Mapping[str, Spec]
    before: Mapping[str, Cost]

    def costs(self, rank: int) -> dict[str, Cost]:
        """Returns what each layer costs with some units."""
        found = {}
        for name, spec in self.specs.items():
            twin, layer = blank(self.group.spec_at(name, spec, rank)), self.layers.get(name)
            if layer is None:
                found[name] = layer_cost(twin)
            else:
                assert layer.stats is not None
                shape = self.group.shape_at(name, layer.stats.input_shape, spec, rank)
                found[name] = layer.cost_model.cost(twin, layer.stats.changed(input_shape=shape))
        return found

    def entries(
        self, rank: int, costs: Mapping[str, Cost], losses: Mapping[str, float], effects: Mapping[str, float]
    ) -> Iterator[Entry]:
        """Yields the lines of the plan.

        Args:
            rank: how many units stay.
            costs: what each layer costs then.
            losses: predicted growth of the loss by each leader.
            effects: measured over predicted loss of each leader.
        """
        for name, spec in self.specs.items():
            layer, loss = self.layers.get(name), losses.get(name, 0.0)
            stats = None if layer is None else layer.stats
            energy = 0.0 if layer is None else layer.energy * effects.get(name, 1.0)
            yield Entry(
                name,
                self.method,
                rank,
                self.before[name],
                costs[name],
                (loss / energy) ** 0.5 if energy > 0 else 0.0,
                spec,
                layer is not None and bias_of(layer.module) is not None,
                None if stats is None else stats.input_shape,
                1.0 if stats is None else stats.repeats,
                self.group.settings(),
                loss,
            )


@dataclass(frozen=True)
class Bundle:
    """Groups that keep one number of units, and their options.

    Args:
        members: the groups; more than one where layers that are alike keep one size.
        ranks: how many units may stay.
        costs: for each number, what each layer costs.
        losses: for each number, what each leader of a group loses.
        effects: measured over predicted loss of each leader, by which its losses have been scaled.
    """

    members: tuple[Member, ...]
    ranks: tuple[int, ...]
    costs: tuple[dict[str, Cost], ...]
    losses: tuple[tuple[float, ...], ...]
    effects: tuple[float, ...]

    @property
    def planned(self) -> set[str]:
        """The layers that single methods compete for."""
        return {name for member in self.members for name in member.group.planned}

    @property
    def leaders(self) -> list[str]:
        """The layers whose errors add up to those of the groups."""
        return [name for member in self.members for name in member.group.leaders]

    def total(self, costs: Mapping[str, Cost], *, only_planned: bool) -> Cost:
        """Returns the sum of costs, relative to what other layers, such as batch norms, cost in the dense model.

        Args:
            costs: what each layer costs.
            only_planned: whether the budget is one of the planned layers, so that others count as a whole.
        """
        before = {name: cost for member in self.members for name, cost in member.before.items()}
        dense = Cost() if only_planned else sum((before[name] for name in costs if name not in self.planned), Cost())
        return sum(costs.values(), Cost()) - dense

    def entries(self, choice: int) -> list[Entry]:
        """Returns the lines of the plan for one of the options."""
        losses, effects = (dict(zip(self.leaders, each, strict=True)) for each in (self.losses[choice], self.effects))
        return [
            entry
            for member in self.members
            for entry in member.entries(self.ranks[choice], self.costs[choice], losses, effects)
        ]


def find_members(
    model: nn.Module, request: Request, layers: Mapping[str, Candidate], closed: Collection[str], *, uniform: bool
) -> list[Member]:
    """Returns the groups whose layers are all planned.

    Args:
        model: the dense model, its attentions opened.
        request: what make_plan was asked for.
        layers: the layers that are planned.
        closed: names of the modules while attentions are not opened: the others are no layers that can be cut.
        uniform: whether they are bundled, so that no two of them may have a layer in common.

    Raises:
        LowRankError: if there are none, and no single method is asked for.
    """
    if request.stats is None or not request.groups:
        return []
    modules, found, taken = dict(model.named_modules()), list[Member](), set[str]()
    for method in request.groups:
        for group in method.find(model, request.stats):
            own = {name: layers[name] for name in group.layers if name in layers}
            if set(own) != set(group.planned) or not set(group.layers).issubset(closed):
                continue
            if any(each.idle for each in own.values()) or (uniform and taken.intersection(own)):
                continue
            taken.update(own)
            specs = {name: describe(modules[name]) for name in group.layers}
            before = {name: own[name].before if name in own else layer_cost(modules[name]) for name in group.layers}
            found.append(Member(method.name, group, own, specs, before))
    if not found and not request.methods:
        raise LowRankError(
            f"make_plan: got the methods {list(request.groups)!r} alone, but none of the planned layers are a group"
            " that they take; add methods of single layers, or skip fewer layers."
        )
    return found


@full_precision
def make_bundles(
    model: nn.Module,
    members: list[Member],
    request: Request,
    measuring: Effects | None,
    effects: dict[str, float],
    *,
    uniform: bool,
) -> list[Bundle]:
    """Returns the options of groups, those of layers that are alike together where sizes are uniform.

    Args:
        model: the dense model, its attentions opened.
        members: the groups.
        request: what make_plan was asked for.
        measuring: what scales their losses, where layers are measured.
        effects: is given what scaled them.
        uniform: whether layers that are alike keep one size.
    """
    alike: dict[Any, list[Member]] = {}
    for index, member in enumerate(members):
        specs = repr(list(member.specs.values()))
        alike.setdefault((member.method, member.group.count, specs) if uniform else index, []).append(member)
    bundles = []
    for together in alike.values():
        ranks = _ranks(together[0].group, request.round_to)
        if not ranks:
            continue
        curves, scales = list[list[float]](), list[float]()
        for member in together:
            assert request.stats is not None
            choices = member.group.choices(model, request.stats, request.damping)
            losses = zip(*map(choices.losses, ranks), strict=True)
            for index, (leader, curve) in enumerate(zip(member.group.leaders, losses, strict=True)):
                effect = 1.0
                if measuring is not None:
                    effect = effects[f"{member.method} of {leader}"] = _effect(
                        member, index, choices, ranks, request, measuring
                    )
                curves.append([effect * loss for loss in curve])
                scales.append(effect)
                member.layers[leader].release()
        costs = [{name: cost for member in together for name, cost in member.costs(rank).items()} for rank in ranks]
        bundles.append(Bundle(tuple(together), ranks, tuple(costs), tuple(zip(*curves, strict=True)), tuple(scales)))
    return bundles


def _ranks(group: LayerGroup, round_to: int) -> tuple[int, ...]:
    """The numbers of units that are offered."""
    step = group.step
    parts = spread(group.count // step, STEPS, lcm(step, round_to) // step)
    return tuple(step * part for part in parts if step * part < group.count)


def _effect(
    member: Member,
    index: int,
    choices: Choices,
    ranks: tuple[int, ...],
    request: Request,
    measuring: Effects,
) -> float:
    """Measured over predicted loss at the number of units nearest to half of them that loses enough to be seen."""
    group, name = member.group, member.group.leaders[index]
    leader = member.layers[name]
    assert leader.stats is not None
    losses = {rank: choices.losses_alone(rank)[index] for rank in ranks}
    seen = [rank for rank in ranks if losses[rank] > VISIBLE * leader.energy]
    if not seen:
        return 1.0
    rank = min(seen, key=lambda rank: abs(rank - SHARE * group.count))
    make = partial(group.reduced, name, leader.module, leader.stats, request.damping, choices.kept(rank))
    return measuring.group_effect(f"{member.method} of {name}", name, make, losses[rank])
