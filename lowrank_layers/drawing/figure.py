"""Figures, their axes, their colours, and how they are saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..checks import check_integer
from ..errors import LowRankError, MissingExtraError
from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (2008); their black is the style's colour of text, which is white in the dark.
_HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_MOST_NAMED = 12
_WIDTH, _HEIGHT = 5.5, 4.2

SIGNED = "RdBu_r"
"""The colour map of values of both signs, whose middle is zero."""


def panels(count: int) -> list[Axes]:
    """Creates a figure with ``count`` axes side by side.

    Args:
        count: number of axes.

    Returns:
        The axes, from left to right.

    Raises:
        LowRankError: for what is no number of axes.
        MissingExtraError: if matplotlib is not installed.
    """
    check_integer(count, "panels", "count", 1)
    return row(count, width=_WIDTH, height=_HEIGHT)


def given_or_new(ax: Axes | None, who: str, *, width: float = _WIDTH, height: float = _HEIGHT) -> Axes:
    """Returns the axes that the user gave to the function ``who``, or those of a new figure of this size in inches."""
    if ax is None:
        return row(1, width=width, height=height)[0]
    if not hasattr(ax, "get_xaxis"):
        raise LowRankError(f"{who}: got ax={ax!r}, expected axes of matplotlib, such as one of plot.panels(2).")
    return ax


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

    Raises:
        LowRankError: for what is no figure, or a format that matplotlib does not write.
    """
    whole: Any = getattr(figure, "figure", None)
    if not hasattr(whole, "savefig"):
        raise LowRankError(f"save_figure: got {type(figure).__name__}, expected a figure of matplotlib or its axes.")
    suffix = Path(path).suffix.lower()[1:]
    if suffix not in (known := whole.canvas.get_supported_filetypes()):
        raise LowRankError(f"save_figure: got the file {os.fspath(path)!r}, expected one of .{', .'.join(known)}.")
    if whole.get_layout_engine() is None:
        whole.tight_layout()
    with replacing(path) as temporary:
        whole.savefig(temporary, dpi=150, format=suffix)


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
