"""Hidden units as the group of layers of a plan that loses them together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStats, Statistics
from ...layers import bias_of, mark_resized, matrices_of, weight_of
from ...layers.config import Spec
from ...linalg import full_precision
from ..damping import Damping
from ..regression import Metric
from .cut import columns_of
from .eliminate import Elimination, eliminate, map_from
from .find import HiddenUnits
from .problem import unit_problem


@dataclass(frozen=True)
class UnitGroup(HiddenUnits):
    """Hidden units with the layers that make them and the one that reads them; a :class:`LayerGroup`.

    Args:
        producers: the layers of which they are outputs; of a gated unit there are two.
        norms: the batch norms that take the producers' outputs.
        consumer: the layer that reads them.
        count: how many there are.
    """

    @property
    def planned(self) -> tuple[str, ...]:
        """The layers that single methods compete for."""
        return *self.producers, self.consumer

    @property
    def leaders(self) -> tuple[str]:
        """The layer that reads the units, whose error is that of the group."""
        return (self.consumer,)

    @property
    def step(self) -> int:
        """Any number of units may stay."""
        return 1

    def settings(self) -> dict[str, Any]:
        """Returns the group as a plan's file holds it."""
        return asdict(self)

    def spec_at(self, name: str, spec: Spec, rank: int) -> Spec:
        """Returns the settings of a layer that is left with some units.

        Args:
            name: the layer.
            spec: its settings with all units.
            rank: how many stay.
        """
        sides = ("in_features", "in_channels") if name == self.consumer else _OUTPUTS
        return {key: value // self.count * rank if key in sides else value for key, value in spec.items()}

    def shape_at(self, name: str, shape: tuple[int, ...] | None, layer: Spec, rank: int) -> tuple[int, ...] | None:
        """Returns the shape of the input of a layer that is left with some units.

        Args:
            name: the layer.
            shape: that of its input with all units, where it is known.
            layer: its settings.
            rank: how many stay.
        """
        if shape is None or name != self.consumer:
            return shape
        axis = len(shape) - 1 - len(layer.get("kernel_size", ()))
        return *shape[:axis], shape[axis] // self.count * rank, *shape[axis + 1 :]

    def damping(self, damping: Damping) -> Damping:
        """Returns the ridges on the moments of its leaders.

        Args:
            damping: those of the plan.
        """
        return damping.of_units

    def check(self, model: nn.Module, stats: Statistics, rank: int) -> None:
        """Does nothing: the model ran with fewer units when they were found.

        Args:
            model: the dense model.
            stats: its statistics.
            rank: how many stay.
        """

    def choices(self, model: nn.Module, stats: Statistics, damping: Damping) -> Elimination:
        """Returns the order in which units go, and by how much the loss grows with each.

        Args:
            model: the dense model.
            stats: its statistics.
            damping: ridges on the moments.
        """
        reader, known = model.get_submodule(self.consumer), stats[self.consumer].changed(free_bias=False)
        return eliminate(unit_problem(reader, known, self.damping(damping)), self.count)

    @full_precision
    @torch.no_grad()
    def reduced(
        self,
        name: str,
        dense: nn.Module,
        stats: LayerStats,
        damping: Damping,
        kept: Tensor,
        outputs: Sequence[Metric | None] | None = None,
    ) -> nn.Module:
        """Returns the layer that reads the units, of the same size, with zeros for those that go.

        The columns that stay have the best map from them, on the inputs of the statistics.

        Args:
            name: its name.
            dense: the layer that reads them; not changed.
            stats: its statistics, which may be those behind a compressed prefix.
            damping: ridges on the moments.
            kept: the units that stay.
            outputs: as in :class:`Candidate`.
        """
        problem = unit_problem(dense, stats.changed(free_bias=False), self.damping(damping), outputs)
        columns = columns_of(dense, kept.to(weight_of(dense).device), self.count)
        matrix = torch.zeros_like(problem.weight).index_copy_(1, columns, map_from(problem, columns))
        new, bias = copy.deepcopy(dense), problem.corrected_bias(matrix)
        weight_of(new).copy_(matrix.reshape(weight_of(new).shape))
        if bias is not None and bias_of(new) is not None:
            new.get_parameter("bias").copy_(bias)
        return new

    def cut_(self, model: nn.Module, kept: Tensor) -> None:
        """Leaves the layers of a model with the units that stay, in place, and marks them as resized.

        Args:
            model: the model; the reader has zeros for the units that go.
            kept: the units that stay.
        """
        modules = {name: model.get_submodule(name) for name in self.layers}
        reader = modules[self.consumer]
        units = kept.to(weight_of(reader).device)
        self.take_(modules, units, matrices_of(reader)[0][:, columns_of(reader, units, self.count)])
        for name in self.layers:
            mark_resized(modules[name])


_OUTPUTS = ("out_features", "out_channels", "num_features")
"""What torch.nn calls the number of outputs of a layer, or of features of a batch norm."""
