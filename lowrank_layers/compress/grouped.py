"""What a plan's groups of layers become: checked, chosen from the dense model's statistics, and cut in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..calibrate.statistics import Statistics
from ..checks import is_integer
from ..errors import LowRankError
from ..layers import is_resized, unmark_resized
from .entry import Entry
from .group_method import LayerGroup
from .hidden_units.model_config import adopt_config_
from .planned_layers import PlannedLayers


def groups_of(plan: PlannedLayers) -> Iterator[tuple[LayerGroup, int]]:
    """Yields the groups of a plan, and how many units stay in each.

    Args:
        plan: the plan.
    """
    for entry in plan:
        if entry.is_grouped and entry.name == (group := entry.group).leaders[0]:
            yield group, entry.rank


def check_units(group: LayerGroup, rank: Any, name: str) -> None:
    """Raises unless so many units may stay in a group.

    Args:
        group: the group.
        rank: how many.
        name: the layer that is spoken of.
    """
    if not is_integer(rank, 1) or rank > group.count or rank % group.step:
        what = "an integer" if group.step == 1 else f"a multiple of {group.step}"
        raise LowRankError(f"{name!r}: got {rank!r} units, expected {what} from {group.step} to {group.count}.")


def check_group(
    model: nn.Module, entry: Entry, plan: PlannedLayers, stats: Statistics | None, optimizer: object
) -> None:
    """Raises unless a layer can change as the plan says, together with the others of its group.

    Args:
        model: the dense model; it is as before afterwards.
        entry: its line of the plan.
        plan: the plan.
        stats: the statistics of the model.
        optimizer: what :func:`factorize_` was given.
    """
    group, name = entry.group, entry.name
    names = {*group.layers}
    together = [each for each in plan if each.name in names and each.is_grouped]
    same = all(
        (each.method, each.rank, each.settings) == (entry.method, entry.rank, entry.settings) for each in together
    )
    if name not in names or len(together) < len(names) or not same:
        raise LowRankError(
            f"{name!r}: the plan has {entry.method!r} of rank {entry.rank} for it and not for all of"
            f" {', '.join(group.layers)}, expected the same for all; plan anew, or change it by set_rank and drop."
        )
    check_units(group, entry.rank, name)
    missing = group.leaders if stats is None else [each for each in group.leaders if each not in stats]
    if stats is None or missing:
        raise LowRankError(
            f"{name!r}: the method {entry.method!r} needs statistics of {missing[0]!r}, which say which units others"
            " make up for; expected stats=calibrate(model, batches)."
        )
    if optimizer is not None:
        raise LowRankError(
            f"{name!r}: got an optimizer with a plan that has {entry.method!r}, whose layers get other sizes; leave"
            " optimizer out and make it afterwards, or plan with methods=[*lr.METHODS.values()]."
        )
    if name == group.leaders[0]:
        group.check(model, stats, entry.rank)


def kept_units(model: nn.Module, plan: PlannedLayers, stats: Statistics | None) -> dict[str, Any]:
    """Returns what stays in each group, by its leaders.

    Args:
        model: the dense model.
        plan: the plan.
        stats: the statistics of the dense model.
    """
    kept: dict[str, Any] = {}
    for group, rank in groups_of(plan):
        assert stats is not None
        kept |= dict.fromkeys(group.leaders, group.choices(model, stats, plan.damping).kept(rank))
    return kept


@torch.no_grad()
def cut_groups_(model: nn.Module, plan: PlannedLayers, kept: Mapping[str, Any]) -> None:
    """Leaves the layers of a model with the units that stay, in place.

    Args:
        model: the model, with the leaders of groups that do without the others.
        plan: the plan.
        kept: what :func:`kept_units` returned.
    """
    for group, _ in groups_of(plan):
        group.cut_(model, kept[group.leaders[0]])


def adopt_sizes_(model: nn.Module, plan: PlannedLayers) -> None:
    """Gives a model's configuration the sizes of a uniform plan, where that describes the model, in place.

    Its layers have the sizes that the model would be built with then, and are not marked as resized any more.

    Args:
        model: the model.
        plan: the plan.
    """
    if not plan.settings.get("uniform"):
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = [(group, rank) for group, rank in groups_of(plan) if any(is_resized(modules[n]) for n in group.layers)]
    if groups and adopt_config_(model, {group.count: rank for group, rank in groups}):
        for group, _ in groups:
            for name in group.layers:
                unmark_resized(modules[name])
