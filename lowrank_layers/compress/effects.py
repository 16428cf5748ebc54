"""Where the effects of layers on the output come from: they are measured, or known from an earlier plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ..calibrate import check_batches
from ..checks import is_number
from ..errors import LowRankError
from .allocation import Offer
from .candidates import Candidate
from .units import Units


class Effects(Protocol):
    """Measured over predicted loss of the layers of a model."""

    def effect(self, name: str, layer: Candidate, offers: Sequence[Offer]) -> float:
        """Returns that of a layer.

        Args:
            name: the layer.
            layer: what planning knows of it.
            offers: its options, dense first.
        """

    def group_effect(self, key: str, leader: str, make: Callable[[], nn.Module], loss: float) -> float:
        """Returns that of layers that change together.

        Args:
            key: the name under which a plan keeps it.
            leader: the layer whose error is that of the group.
            make: builds the layer that takes its place, with which the model is what it is without some units.
            loss: what is predicted of that.
        """


class KnownEffects:
    """Effects that were measured for an earlier plan.

    Args:
        effects: measured over predicted loss, by layer.
        layers: names of the layers that are planned.

    Raises:
        LowRankError: if a layer is missing, or an effect is no positive number.
    """

    def __init__(self, effects: Mapping[str, float], layers: Iterable[str]) -> None:
        if not isinstance(effects, Mapping):
            raise LowRankError(
                f"make_plan: got effects of type {type(effects).__name__}, expected those of an earlier plan:"
                " effects=plan.effects."
            )
        missing = [name for name in layers if name not in effects]
        if missing:
            raise LowRankError(
                f"make_plan: got effects that do not know {missing[0]!r}, expected those of a plan of the same layers;"
                " give batches= to measure them."
            )
        for name, effect in effects.items():
            if not is_number(effect) or not 0 < effect < math.inf:
                raise LowRankError(f"make_plan: got the effect {effect!r} of {name!r}, expected a positive number.")
        self._effects = effects

    def effect(self, name: str, layer: Candidate, offers: Sequence[Offer]) -> float:
        """Returns measured over predicted loss of a layer.

        Args:
            name: the layer.
            layer: what planning knows of it.
            offers: its options, dense first.
        """
        return self._effects[name]

    def group_effect(self, key: str, leader: str, make: Callable[[], nn.Module], loss: float) -> float:
        """Returns measured over predicted loss of layers that change together, or of their leader alone.

        Args:
            key: the name under which a plan keeps it.
            leader: the layer whose error is that of the group.
            make: what would be measured.
            loss: what is predicted of that.
        """
        return self._effects.get(key, self._effects[leader])


def measured_on(batches: Any, units: Units | None, effects: object, *, planned: bool) -> list[Any] | None:
    """Returns the batches that layers are measured on; ``None`` where they are not measured.

    Args:
        batches: what :func:`make_plan` was given.
        units: likewise.
        effects: likewise.
        planned: whether losses of layers are compared.
    """
    if batches is None and effects is None:
        if units == "measured":
            raise LowRankError(
                "make_plan: got units='measured' without batches, expected batches= of those that the model was"
                " calibrated on, or effects= of an earlier plan."
            )
        return None
    given = "effects" if batches is None else "batches"
    if units not in (None, "measured") or not planned:
        raise LowRankError(
            f"make_plan: got {given} with units={units!r}, a rank or another allocation, expected units='measured' or"
            f" None and a budget; leave {given} out."
        )
    if batches is None:
        return None
    if effects is not None:
        raise LowRankError("make_plan: got batches and effects, expected one of them; leave batches out.")
    check_batches(batches, "make_plan")
    known = list(batches)
    if not known:
        raise LowRankError("make_plan: got no batches; give some of those that the model was calibrated on, or None.")
    return known
