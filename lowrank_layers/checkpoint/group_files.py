"""Groups of layers that become smaller together, of a model whose parameters are in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..calibrate.processes import Processes
from ..compress import Plan
from ..compress.grouped import groups_of
from ..files import read_tensors, write_tensors
from ..memory import map_parameter, spilled

_KEY = "lowrank_layers.units"


def kept_in_file(path: Path, find: Callable[[], Mapping[str, Tensor]], processes: Processes) -> dict[str, Tensor]:
    """Returns which units stay in groups of layers, by their leaders, so that a run that goes on takes the same.

    Args:
        path: the file that holds them, which is written first where it is not there.
        find: finds them.
        processes: those that all call this, of which the first one finds them.
    """

    def write() -> None:
        write_tensors(path, find(), _KEY, {})

    if not processes.from_first(path.is_file):
        processes.from_first(write)
    return read_tensors(path, _KEY, "does not say which units stay.")[1]


def cut_to_files_(model: nn.Module, plan: Plan, kept: Mapping[str, Tensor], folder: Path) -> None:
    """Leaves the layers of groups with the units that stay, in place, and the new parameters in files.

    Args:
        model: the model, with the leaders of groups that do without the other units.
        plan: the plan.
        kept: which units stay, by leaders.
        folder: where the files are; they have no names and end with the model.
    """
    for group, _ in groups_of(plan):
        group.cut_(model, kept[group.leaders[0]])
        for name in group.layers:
            layer = model.get_submodule(name)
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    layer._parameters[key] = map_parameter(spilled(parameter.detach(), folder))
