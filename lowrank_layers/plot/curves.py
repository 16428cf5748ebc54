"""Lines of accuracy, loss and perplexity: against steps, parameters and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..drawing import colour, figure_of, given_or_new, ink, legend, logarithmic, whole_x
from .labelled import labelled, points_of

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
        LowRankError: if there are no points, or what is given is none.
        MissingExtraError: if matplotlib is not installed.
    """
    who, whole = "accuracy_against_size", []
    if dense is not None:
        whole = points_of({"dense": [dense]}, who)["dense"]
    axes = _lines(who, points_of(curves, who), ax, "o-")
    for point in whole:
        axes.plot(*point, "*", color=ink(), markersize=12, label="dense")
        legend(axes)
    axes.set(xlabel="parameters", ylabel="test accuracy, %", title="Accuracy against size")
    logarithmic(axes)
    return figure_of(axes)


def losses(curves: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Figure:
    """Plots training losses against steps, one line per run.

    Args:
        curves: for each label the losses, step by step.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points, or what is given is none.
        MissingExtraError: if matplotlib is not installed.
    """
    members = labelled(curves, "losses", "numbers")
    points = points_of({label: enumerate(values, start=1) for label, values in members.items()}, "losses", "numbers")
    axes = _lines("losses", points, ax)
    axes.set(xlabel="step", ylabel="training loss", title="Training")
    whole_x(axes)
    return figure_of(axes)


def perplexity_against_bytes(curves: Mapping[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Figure:
    """Plots perplexity against the size of a key/value cache, one line per kind of cache.

    Args:
        curves: for each label the points ``(bytes, perplexity)``.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points, or what is given is none.
        MissingExtraError: if matplotlib is not installed.
    """
    who = "perplexity_against_bytes"
    axes = _lines(who, points_of(curves, who), ax, "o-", unit=1024)
    axes.set(xlabel="cache, KiB", ylabel="perplexity", title="Perplexity against bytes")
    logarithmic(axes)
    return figure_of(axes)


def loss_against_wire_bytes(curves: Mapping[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Figure:
    """Plots the training loss against the bytes sent per process, one line per way to average gradients.

    Args:
        curves: for each label the points ``(bytes sent so far, loss)``.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points, or what is given is none.
        MissingExtraError: if matplotlib is not installed.
    """
    who = "loss_against_wire_bytes"
    axes = _lines(who, points_of(curves, who), ax, unit=2**20)
    axes.set(xlabel="sent per process, MiB", ylabel="training loss", title="Loss against bytes")
    logarithmic(axes)
    return figure_of(axes)


def _lines(
    who: str, curves: Mapping[str, Sequence[tuple[float, float]]], ax: Axes | None, style: str = "-", unit: int = 1
) -> Axes:
    """Draws one line per label through its points, sorted by their first coordinate, which is in ``unit`` bytes."""
    axes = given_or_new(ax, who)
    for k, (label, curve) in enumerate(curves.items()):
        points = sorted(curve)
        axes.plot([x / unit for x, _ in points], [y for _, y in points], style, color=colour(k), label=label)
    legend(axes)
    return axes
