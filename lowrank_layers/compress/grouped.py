"""What a plan's groups of layers become: checked, chosen from the dense model's statistics, and cut in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..calibrate.statistics import Statistics
from ..checks import is_integer
from ..errors import LowRankError
from ..layers import unmark_resized
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
        if entry.is_grouped and entry.name == (group := entry.group).leader:
            yield group, entry.rank


def check_group(entry: Entry, plan: PlannedLayers, stats: Statistics | None, optimizer: object) -> None:
    """Raises unless a layer can change as the plan says, together with the others of its group.

    Args:
        entry: its line of the plan.
        plan: the plan.
        stats: the statistics of the model.
        optimizer: what :func:`factorize_` was given.
    """
    group, name = entry.group, entry.name
    together = [each for each in plan if each.name in group.layers and each.is_grouped]
    facts = {(each.method, each.rank, each.group) for each in together}
    if name not in group.layers or len(together) < len(group.layers) or len(facts) > 1:
        raise LowRankError(
            f"{name!r}: the plan has {entry.method!r} of rank {entry.rank} for it and not for all of"
            f" {', '.join(group.layers)}, expected the same for all; plan anew, or change it by set_rank and drop."
        )
    if not is_integer(entry.rank, 1) or entry.rank > group.count:
        raise LowRankError(f"{name!r}: got {entry.rank!r} units, expected an integer from 1 to {group.count}.")
    if stats is None or group.leader not in stats:
        raise LowRankError(
            f"{name!r}: the method {entry.method!r} needs statistics of {group.leader!r}, which say which units others"
            " make up for; expected stats=calibrate(model, batches)."
        )
    if optimizer is not None:
        raise LowRankError(
            f"{name!r}: got an optimizer with a plan that has {entry.method!r}, whose layers get other sizes; leave"
            " optimizer out, and make it afterwards."
        )


def kept_units(model: nn.Module, plan: PlannedLayers, stats: Statistics | None) -> dict[str, Tensor]:
    """Returns the units that stay in each group, by its leader.

    Args:
        model: the dense model.
        plan: the plan.
        stats: the statistics of the dense model.
    """
    kept = {}
    for group, rank in groups_of(plan):
        assert stats is not None
        order = group.order(model.get_submodule(group.leader), stats[group.leader], plan.damping)
        kept[group.leader] = group.kept(order, rank)
    return kept


@torch.no_grad()
def cut_groups_(model: nn.Module, plan: PlannedLayers, kept: Mapping[str, Tensor]) -> None:
    """Leaves the layers of a model with the units that stay, in place.

    Args:
        model: the model, with the leaders of groups that do without the others.
        plan: the plan.
        kept: what :func:`kept_units` returned.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for group, _ in groups_of(plan):
        group.cut_(modules, kept[group.leader])


def adopt_sizes_(model: nn.Module, plan: PlannedLayers) -> None:
    """Gives a model's configuration the sizes of a uniform plan, where that describes the model, in place.

    Its layers have the sizes that the model would be built with then, and are not marked as resized any more.

    Args:
        model: the model.
        plan: the plan.
    """
    groups = list(groups_of(plan))
    if plan.settings.get("uniform") and groups and adopt_config_(model, {group.count: rank for group, rank in groups}):
        modules = dict(model.named_modules(remove_duplicate=False))
        for group, _ in groups:
            for name in group.layers:
                unmark_resized(modules[name])
