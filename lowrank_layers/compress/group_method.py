"""The contract of a method over several layers: groups of layers become smaller together, with a plain model left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..calibrate.statistics import LayerStats, Statistics
from ..layers.config import Spec
from .damping import Damping
from .hidden_units.eliminate import Elimination
from .regression import Metric


class LayerGroup(Protocol):
    """Layers that change together: as many of the units between them stay in all of them.

    Implementations are frozen dataclasses of plain values, which a plan's file holds.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all the layers that change."""

    @property
    def planned(self) -> tuple[str, ...]:
        """Those that single methods compete for."""

    @property
    def leader(self) -> str:
        """The one of these whose error is that of the group."""

    @property
    def count(self) -> int:
        """How many units there are."""

    def settings(self) -> dict[str, Any]:
        """Returns the group as a plan's file holds it."""

    def spec_at(self, name: str, spec: Spec, rank: int) -> Spec:
        """Returns the settings of a layer that is left with some units.

        Args:
            name: the layer.
            spec: its settings with all units.
            rank: how many stay.
        """

    def shape_at(self, name: str, shape: tuple[int, ...] | None, layer: Spec, rank: int) -> tuple[int, ...] | None:
        """Returns the shape of the input of a layer that is left with some units.

        Args:
            name: the layer.
            shape: that of its input with all units, where it is known.
            layer: its settings.
            rank: how many stay.
        """

    def order(self, dense: nn.Module, stats: LayerStats, damping: Damping) -> Elimination:
        """Returns the order in which units go, and by how much the loss grows with each.

        Args:
            dense: the leader.
            stats: its statistics in the dense model.
            damping: ridges on the moments.
        """

    def kept(self, order: Elimination, rank: int) -> Tensor:
        """Returns the units that stay, ascending.

        Args:
            order: what :meth:`order` returned.
            rank: how many stay.
        """

    def reduced(
        self,
        dense: nn.Module,
        stats: LayerStats,
        damping: Damping,
        kept: Tensor,
        outputs: Sequence[Metric | None] | None = None,
    ) -> nn.Module:
        """Returns a leader of the same size that does without the units that go, as well as it can.

        Args:
            dense: the leader; not changed.
            stats: its statistics, which may be those behind a compressed prefix.
            damping: ridges on the moments.
            kept: the units that stay.
            outputs: as in :class:`Candidate`.
        """

    def cut_(self, modules: Mapping[str, nn.Module], kept: Tensor) -> None:
        """Leaves the layers of a model with the units that stay, in place, and marks them as resized.

        Args:
            modules: the modules of the model, with the leader that :meth:`reduced` returned.
            kept: the units that stay.
        """


class GroupMethod(Protocol):
    """A way to make several layers smaller together. Implementations are frozen dataclasses without fields."""

    name: ClassVar[str]
    """Its name in plans and files."""

    def find(self, model: nn.Module, stats: Statistics) -> Sequence[LayerGroup]:
        """Returns the groups of a model, in forward order.

        Args:
            model: the dense model; it is as before afterwards.
            stats: its statistics.
        """

    def read(self, settings: Mapping[str, Any]) -> LayerGroup:
        """Returns the group that a plan's file holds.

        Args:
            settings: what its ``settings`` returned.
        """
