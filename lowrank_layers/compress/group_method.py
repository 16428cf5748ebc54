"""The contract of a method over several layers: groups of layers become smaller together, with a plain model left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from ..calibrate.statistics import LayerStats, Statistics
from ..layers.config import Spec
from .damping import Damping
from .regression import Metric


class Choices(Protocol):
    """What may stay of a group of layers, and what it loses then."""

    def losses(self, rank: int) -> Sequence[float]:
        """Returns by how much the loss grows by each leader of the group.

        Args:
            rank: how many units stay.
        """

    def losses_alone(self, rank: int) -> Sequence[float]:
        """Returns by how much it grows by the layer that takes the place of each leader, while sizes are the old ones.

        Args:
            rank: how many units stay.
        """

    def kept(self, rank: int) -> Any:
        """Returns what stays, in the form in which the group takes it.

        Args:
            rank: how many units stay.
        """


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
    def leaders(self) -> tuple[str, ...]:
        """Those of these whose errors add up to that of the group."""

    @property
    def count(self) -> int:
        """How many units there are."""

    @property
    def step(self) -> int:
        """The number of units that stay is a multiple of it."""

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

    def damping(self, damping: Damping) -> Damping:
        """Returns the ridges on the moments of its leaders.

        Args:
            damping: those of the plan.
        """

    def check(self, model: nn.Module, stats: Statistics, rank: int) -> None:
        """Raises unless a model can be left with some units.

        Args:
            model: the dense model; it is as before afterwards.
            stats: its statistics.
            rank: how many stay.

        Raises:
            LowRankError: if it cannot.
        """

    def choices(self, model: nn.Module, stats: Statistics, damping: Damping) -> Choices:
        """Returns what may stay, and by how much the loss grows then.

        Args:
            model: the dense model.
            stats: its statistics.
            damping: ridges on the moments.
        """

    def reduced(
        self,
        name: str,
        dense: nn.Module,
        stats: LayerStats,
        damping: Damping,
        kept: Any,
        outputs: Sequence[Metric | None] | None = None,
    ) -> nn.Module:
        """Returns a layer of the same size that does without the units that go, as well as it can.

        Args:
            name: one of the leaders.
            dense: the layer of this name; not changed.
            stats: its statistics, which may be those behind a compressed prefix.
            damping: ridges on the moments.
            kept: what :class:`Choices` returned.
            outputs: as in :class:`Candidate`.
        """

    def cut_(self, model: nn.Module, kept: Any) -> None:
        """Leaves the layers of a model with the units that stay, in place.

        Layers whose sizes the configuration of the model does not say afterwards are marked as resized.

        Args:
            model: the model, with leaders that :meth:`reduced` returned.
            kept: what :class:`Choices` returned.
        """


class GroupMethod(Protocol):
    """A way to make several layers smaller together. Implementations are frozen dataclasses."""

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
