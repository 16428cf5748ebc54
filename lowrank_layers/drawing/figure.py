"""Figures, their axes, their colours, and how they are saved."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (2008); their black is the style's colour of text, which is white in the dark.
_HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_MOST_NAMED = 12

SIGNED = "RdBu_r"
"""The colour map of values of both signs, whose middle is zero."""


def panels(count: int) -> list[Axes]:
    """Creates a figure with ``count`` axes side by side.

    Args:
        count: number of axes.

    Returns:
        The axes, from left to right.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    return row(count, width=5.5, height=4.2)


def row(count: int, *, width: float, height: float, **options: Any) -> list[Axes]:
    """Creates ``count`` axes side by side, each of this size in inches, with options of ``Figure.subplots``."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise MissingExtraError('Plots need matplotlib: pip install "lowrank-layers[plot]".') from None
    figure = plt.figure(figsize=(width * count, height), layout=ConstrainedLayoutEngine(w_pad=0.1))
    return list(figure.subplots(1, count, squeeze=False, **options)[0])


def figure_of(axes: Axes) -> Figure:
    """The figure that the axes belong to."""
    return cast("Figure", axes.figure)


def save_figure(figure: Figure | Axes, path: str | os.PathLike[str]) -> None:
    """Saves a figure.

    Args:
        figure: the figure, or any axes of it.
        path: the file to write; its suffix is the format.
    """
    whole: Any = figure.figure
    if whole.get_layout_engine() is None:
        whole.tight_layout()
    whole.savefig(path, dpi=150)


def legend(axes: Axes) -> None:
    """Names the lines in a legend; more than a dozen stay unnamed, since they would be covered."""
    if 0 < len(axes.get_legend_handles_labels()[0]) <= _MOST_NAMED:
        axes.legend(fontsize="small")


def ink() -> str:
    """The style's colour of text, for what stands out against the background."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def colour(index: int) -> str:
    """The colour of a line by its index."""
    colours = (*_HUES, ink())
    return colours[index % len(colours)]
