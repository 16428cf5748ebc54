"""Lines of accuracy, loss and perplexity: against steps, parameters and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..drawing import colour, figure_of, ink, logarithmic, panels, whole_x
from ..errors import LowRankError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy_against_size(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    dense: tuple[int, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Plots accuracy against the number of parameters, one line per method.

    Args:
        curves: for each label the points ``(parameters, accuracy in percent)``.
        dense: the point of the dense model.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points.
        MissingExtraError: if matplotlib is not installed.
    """
    axes = _lines("accuracy_against_size", curves, ax, "o-")
    if dense is not None:
        axes.plot(*dense, "*", color=ink(), markersize=12, label="dense")
        axes.legend(fontsize="small")
    axes.set(xlabel="parameters", ylabel="test accuracy, %", title="Accuracy against size")
    logarithmic(axes)
    return figure_of(axes)


def losses(curves: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Figure:
    """Plots training losses against steps, one line per run.

    Args:
        curves: for each label the losses, step by step.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points.
        MissingExtraError: if matplotlib is not installed.
    """
    axes = _lines("losses", {label: enumerate(values, start=1) for label, values in curves.items()}, ax)
    axes.set(xlabel="step", ylabel="training loss", title="Fine-tuning")
    whole_x(axes)
    return figure_of(axes)


def perplexity_against_bytes(curves: Mapping[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Figure:
    """Plots perplexity against the size of a key/value cache, one line per kind of cache.

    Args:
        curves: for each label the points ``(bytes, perplexity)``.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points.
        MissingExtraError: if matplotlib is not installed.
    """
    axes = _lines("perplexity_against_bytes", _scaled(curves, 1024), ax, "o-")
    axes.set(xlabel="cache, KiB", ylabel="perplexity", title="Perplexity against bytes")
    logarithmic(axes)
    return figure_of(axes)


def loss_against_wire_bytes(curves: Mapping[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Figure:
    """Plots the training loss against the bytes sent per process, one line per way to average gradients.

    Args:
        curves: for each label the points ``(bytes sent so far, loss)``.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points.
        MissingExtraError: if matplotlib is not installed.
    """
    axes = _lines("loss_against_wire_bytes", _scaled(curves, 2**20), ax)
    axes.set(xlabel="sent per process, MiB", ylabel="training loss", title="Loss against bytes")
    logarithmic(axes)
    return figure_of(axes)


def _lines(name: str, curves: Mapping[str, Iterable[tuple[float, float]]], ax: Axes | None, style: str = "-") -> Axes:
    """Draws one line per label through its points, sorted by their first coordinate."""
    points = {label: sorted(curve) for label, curve in curves.items()}
    if not any(points.values()):
        raise LowRankError(f"{name}: got no points, expected at least one.")
    axes = panels(1)[0] if ax is None else ax
    for k, (label, curve) in enumerate(points.items()):
        axes.plot([x for x, _ in curve], [y for _, y in curve], style, color=colour(k), label=label)
    axes.legend(fontsize="small")
    return axes


def _scaled(curves: Mapping[str, Sequence[tuple[int, float]]], unit: int) -> dict[str, list[tuple[float, float]]]:
    """The same points with their first coordinate in ``unit`` bytes."""
    return {label: [(size / unit, value) for size, value in points] for label, points in curves.items()}
