"""The records of a monitor as curves over the steps of training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..checks import check_type
from ..drawing import colour, figure_of, legend, logarithmic, panels, whole_x
from ..errors import LowRankError
from .leading_spectrum import LeadingSpectrum
from .record import Kind, SpectrumRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def monitor_curves(records: Iterable[SpectrumRecord], kind: Kind = "weights", name: str | None = None) -> Figure:
    """Plots leading singular values and stable ranks against the steps of training.

    Of all matrices the largest singular value is drawn, of a single one every value that was measured.

    Args:
        records: the records of a :class:`SpectrumMonitor`, or those that :func:`read_spectra` read.
        kind: ``"weights"``, ``"gradients"`` or ``"deltas"``.
        name: a single matrix, such as ``"fc1.weight"``; ``None`` draws all matrices.

    Raises:
        LowRankError: for what is no record, and if there is nothing of this kind or name in the records.
        MissingExtraError: if matplotlib is not installed.
    """
    if kind not in ("weights", "gradients", "deltas"):
        raise LowRankError(f"monitor_curves: got kind={kind!r}, expected 'weights', 'gradients' or 'deltas'.")
    found: dict[str, list[tuple[int, LeadingSpectrum]]] = {}
    expected = "the records of a SpectrumMonitor (monitor.records)"
    check_type(records, Iterable, "monitor_curves", expected)
    for record in records:
        check_type(record, SpectrumRecord, "monitor_curves", expected)
        for each, spectrum in getattr(record, kind).items():
            found.setdefault(each, []).append((record.step, spectrum))
    if not found:
        raise LowRankError(f"monitor_curves: got no records of {kind}; train for at least every= steps first.")
    if name is not None:
        if name not in found:
            raise LowRankError(f"monitor_curves: got name={name!r}, expected one of {', '.join(found)}.")
        found = {name: found[name]}
    left, right = panels(2)
    for k, (each, measured) in enumerate(found.items()):
        steps = [step for step, _ in measured]
        count = max(len(spectrum.singular_values) for _, spectrum in measured) if name else 1
        for index in range(count):
            # a matrix with NaN or Inf entries has no singular values
            values = [dict(enumerate(spectrum.singular_values)).get(index, math.nan) for _, spectrum in measured]
            left.plot(steps, values, color=colour(k), alpha=0.9**index, label="" if index else each)
        right.plot(steps, [spectrum.stable_rank for _, spectrum in measured], color=colour(k), label=each)
    title = "singular values" if name else "largest singular value"
    left.set(xlabel="step", ylabel=title, title=f"{kind}: {title}".capitalize())
    right.set(xlabel="step", ylabel="stable rank", title=f"{kind}: stable rank".capitalize())
    if any(spectrum.spectral_norm > 0 for measured in found.values() for _, spectrum in measured):
        logarithmic(left, "y")
    for axes in (left, right):
        whole_x(axes)
        legend(axes)
    return figure_of(left)
