"""Units in which the estimated losses of different layers are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from ..errors import LowRankError
from .candidates import Candidate

Units = Literal["balanced", "absolute", "relative", "trimmed", "measured"]
_EXPONENT = {"absolute": 0.0, "balanced": 0.5, "relative": 1.0, "measured": 0.0}


def check_units(units: object) -> None:
    """Raises for unknown units."""
    if units is not None and units not in get_args(Units):
        raise LowRankError(f"make_plan: got units {units!r}, expected one of {list(get_args(Units))}.")


def default_units(layers: Iterable[Candidate], *, measured: bool = False, reads_tokens: bool | None = False) -> Units:
    """Returns the units in which the losses of a plan are compared where none are asked for.

    ``"measured"`` where layers are; else ``"trimmed"`` where the inputs are known but no gradients, ``"absolute"`` with
    gradients of a model that reads tokens, and ``"balanced"`` otherwise.

    Args:
        layers: the layers of a plan.
        measured: whether their effects on the output were measured.
        reads_tokens: whether the model reads tokens.
    """
    if measured:
        return "measured"
    known = [layer.stats for layer in layers if layer.stats is not None]
    if known and all(stats.gradients is None for stats in known):
        return "trimmed"
    return "absolute" if known and reads_tokens else "balanced"


def comparable(layer: Candidate, losses: Iterable[float], units: Units) -> list[float]:
    """The estimated losses of one layer's options in units in which those of all layers may be added."""
    if units == "trimmed":
        scale = max(layer.trimmed_energy, 1e-12 * layer.energy, 1e-300)
        return [(loss / scale) ** 2 for loss in losses]
    scale = max(layer.energy, 1e-300) ** _EXPONENT[units]
    return [loss / scale for loss in losses]
