"""The histories of recovery and of progressive decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checks import check_type
from ..compress.progressive import Progression
from ..compress.recovery import Recovery
from ..drawing import colour, figure_of, given_or_new, ink, logarithmic, whole_x
from ..errors import LowRankError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def recovery(result: Recovery, *, ax: Axes | None = None) -> Figure:
    """Plots the objective and the held-out scores of a recovery against its steps, and marks the state that was kept.

    Args:
        result: what :func:`recover_` returned.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: for what is no result of :func:`recover_`.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(result, Recovery, "recovery", "what recover_ returned")
    axes = given_or_new(ax, "recovery")
    axes.plot(range(1, len(result.losses) + 1), result.losses, color=colour(0), label="objective")
    axes.set(xlabel="step", ylabel="objective", title="Recovery")
    whole_x(axes)
    lines = list(axes.get_lines())
    if result.scores:
        right = axes.twinx()
        lines += right.plot(*zip(*result.scores, strict=True), "o-", color=colour(1), label="held-out score")
        best = dict(result.scores)[result.best_step]
        lines += right.plot([result.best_step], [best], "*", color=ink(), markersize=12, label="kept")
        right.set_ylabel("held-out score")
    # below the axes, where it covers neither scale's line
    labels = [str(line.get_label()) for line in lines]
    axes.legend(lines, labels, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(lines))
    return figure_of(axes)


def progression(result: Progression, *, ax: Axes | None = None) -> Figure:
    """Plots the held-out scores of a progressive decomposition against parameters, and marks the model that was kept.

    Args:
        result: what :func:`progressive_` returned, with scores.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: for what is no result of :func:`progressive_`, or if nothing was scored.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(result, Progression, "progression", "what progressive_ returned")
    if result.score is None:
        raise LowRankError("progression: got a history without scores, expected validation= or score= in progressive_.")
    axes = given_or_new(ax, "progression")
    sizes, scores, factorized = [result.params], [result.score], []
    for stage in result.stages:
        assert stage.score is not None
        assert stage.factorized_score is not None
        sizes.append(stage.params)
        scores.append(stage.score)
        factorized.append(stage.factorized_score)
    axes.plot(sizes[1:], factorized, "o--", color=colour(1), label="factorized")
    axes.plot(sizes, scores, "o-", color=colour(0), label="recovered")
    axes.plot([sizes[result.kept]], [scores[result.kept]], "*", color=ink(), markersize=12, label="the model")
    axes.set(xlabel="parameters", ylabel="held-out score", title="Progressive decomposition")
    logarithmic(axes)
    axes.legend(fontsize="small")
    return figure_of(axes)
