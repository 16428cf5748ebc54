"""Units in which the estimated losses of different layers are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from ..errors import LowRankError
from .candidates import Candidate

Units = Literal["balanced", "absolute", "relative", "trimmed", "measured"]
_EXPONENT = {"absolute": 0.0, "balanced": 0.5, "relative": 1.0}


def check_units(units: object) -> None:
    """Raises for unknown units."""
    if units is not None and units not in get_args(Units):
        raise LowRankError(f"make_plan: got units {units!r}, expected one of {list(get_args(Units))}.")


def default_units(layers: Iterable[Candidate], *, reads_tokens: bool | None = False) -> Units:
    """Returns the units in which the losses of a plan are compared where none are asked for and no layer is measured.

    ``"trimmed"`` where the inputs are known but no gradients, ``"absolute"`` with gradients of a model that reads
    tokens, and ``"balanced"`` otherwise.

    Args:
        layers: the layers of a plan.
        reads_tokens: whether the model reads tokens.
    """
    known = [layer.stats for layer in layers if layer.stats is not None]
    if known and all(stats.gradients is None for stats in known):
        return "trimmed"
    return "absolute" if known and reads_tokens else "balanced"


def comparable(
    layer: Candidate, losses: Iterable[float], units: Units, *, prior: Units = "absolute", effect: float = 1.0
) -> list[float]:
    """Returns the losses of one layer's options in units in which those of all layers may be added.

    What is measured on a few batches is as wrong in its way as what is estimated: ``"measured"`` units are the
    geometric mean of the measured losses and of the estimated ones in the units of the default.

    Args:
        layer: the layer.
        losses: the losses of its options; where its effect is known, measured ones.
        units: the units.
        prior: the units of the default, without measurement.
        effect: measured over estimated losses.
    """
    if units == "measured":
        measured = list(losses)
        estimated = comparable(layer, [loss / effect for loss in measured], prior)
        return [(a * b) ** 0.5 for a, b in zip(measured, estimated, strict=True)]
    if units == "trimmed":
        scale = max(layer.trimmed_energy, 1e-12 * layer.energy, 1e-300)
        return [(loss / scale) ** 2 for loss in losses]
    scale = max(layer.energy, 1e-300) ** _EXPONENT[units]
    return [loss / scale for loss in losses]
