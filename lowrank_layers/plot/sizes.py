"""Sizes: of the layers of a plan, and of models beside their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ..checks import check_type
from ..compress.entry import Entry
from ..compress.plan import Plan
from ..drawing import colour, few_x, figure_of, given_or_new, ink, logarithmic
from ..errors import LowRankError
from .labelled import points_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {"params": "parameters", "macs": "multiply-accumulates per sample", "bytes": "bytes of weights"}


def plan(chosen: Plan, *, cost: Literal["params", "macs", "bytes"] = "params", ax: Axes | None = None) -> Figure:
    """Draws two bars per layer of a plan: its cost before, and on top of it what it keeps.

    Args:
        chosen: the plan.
        cost: what is counted: ``"params"``, ``"macs"`` or ``"bytes"``.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: for what is no plan, an empty one, or another cost.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(chosen, Plan, "plan", "a plan of make_plan")
    if cost not in _TITLES:
        raise LowRankError(f"plan: got cost {cost!r}, expected one of {', '.join(map(repr, _TITLES))}.")
    entries = list(chosen)
    if not entries:
        raise LowRankError("plan: got a plan without layers, expected at least one.")
    axes = given_or_new(ax, "plan", width=6.5, height=1.4 + 0.28 * len(entries))
    before = [getattr(entry.before, cost) for entry in entries]
    after = [getattr(entry.after, cost) for entry in entries]
    places = range(len(entries))
    axes.barh(places, before, color="#BBBBBB", label="dense")
    axes.barh(places, after, color=colour(0), height=0.5, label="planned")
    for place, (whole, part) in enumerate(zip(before, after, strict=True)):
        share = f" {part / whole:.0%}" if whole else ""
        axes.text(max(whole, part), place, share, va="center", fontsize="small")
    axes.set_yticks(places, [_label(entry) for entry in entries], fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    few_x(axes)
    axes.set(xlabel=_TITLES[cost], title="The plan")
    axes.legend(fontsize="small", loc="best")
    return figure_of(axes)


def size_score_front(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    higher_is_better: bool = True,
    size: str = "parameters",
    score: str = "score",
    ax: Axes | None = None,
) -> Figure:
    """Plots scores against sizes, and the front: the points that no other one beats in both.

    Args:
        points: for each label the points ``(size, score)``.
        higher_is_better: whether a higher score is a better one.
        size: what the sizes are, as the name of the horizontal axis.
        score: what the scores are, as the name of the vertical axis.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points, or what is given is none.
        MissingExtraError: if matplotlib is not installed.
    """
    groups = points_of(points, "size_score_front")
    front: list[tuple[float, float]] = []
    sign = 1 if higher_is_better else -1
    for place, value in sorted((pair for each in groups.values() for pair in each), key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * value > sign * front[-1][1]:
            front.append((place, value))
    axes = given_or_new(ax, "size_score_front")
    axes.step(*zip(*front, strict=True), where="post", color=ink(), linewidth=1, label="front")
    for k, (label, each) in enumerate(groups.items()):
        axes.plot([x for x, _ in each], [y for _, y in each], "o", color=colour(k), label=label)
    axes.set(xlabel=size, ylabel=score, title="Size and score")
    logarithmic(axes)
    axes.legend(fontsize="small")
    return figure_of(axes)


def _label(entry: Entry) -> str:
    """The name of a layer with its method and rank."""
    method = entry.method if entry.bits is None else f"{entry.method} int{entry.bits}"
    if entry.rank is None:
        return f"{entry.name}: {method}"
    ranks = entry.rank if isinstance(entry.rank, tuple) else (entry.rank,)
    return f"{entry.name}: {method} {'x'.join(map(str, ranks))}"
