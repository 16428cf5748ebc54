"""Ticks at few round numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def few_x(axes: Axes) -> None:
    """Puts the ticks of the horizontal axis at a few round numbers, with thousands separators."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.10g}")


def whole_x(axes: Axes) -> None:
    """Puts the ticks of the horizontal axis at a few whole numbers, with thousands separators."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def logarithmic(axes: Axes, which: Literal["x", "y"] = "x") -> None:
    """Makes an axis logarithmic, with ticks at a few round numbers and thousands separators.

    Over less than half a decade they are evenly spaced; over more they are 1, 2 and 5 times powers of ten; over more
    than two decades, powers of ten.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    evenly = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_locator(evenly if high < 5 * low else LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.10g}")
