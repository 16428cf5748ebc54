"""Plots of spectra, accuracies, losses and caches. They need matplotlib, which the extra ``plot`` installs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .calibrate.statistics import Statistics
from .compress.candidates import Candidate
from .compress.plan import Plan
from .compress.progressive import Progression
from .compress.recovery import Recovery
from .errors import LowRankError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One hue per line, readable without colour vision (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def panels(count: int) -> list[Axes]:
    """Creates a figure with ``count`` axes side by side.

    Args:
        count: number of axes.

    Returns:
        The axes, from left to right.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingExtraError('Plots need matplotlib: pip install "lowrank-layers[plot]".') from None
    return list(plt.subplots(1, count, figsize=(5.5 * count, 4.2), squeeze=False)[1][0])


def spectra(model: nn.Module, plan: Plan, stats: Statistics | None = None, *, ax: Axes | None = None) -> Axes:
    """Plots the relative error of each layer against its rank, and marks the rank that the plan chose.

    Args:
        model: the dense model that the plan was made for.
        plan: the plan whose layers are drawn.
        stats: statistics that weight the spectra, as in :func:`make_plan`.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    axes = panels(1)[0] if ax is None else ax
    for k, entry in enumerate(plan):
        known = None if stats is None else stats[entry.name]
        layer = Candidate(model.get_submodule(entry.name), known, damping=plan.damping)
        tails = torch.stack(layer.tails).sum(0)
        lost = (tails / tails[0]).clamp_min(1e-6).sqrt().tolist()
        full = len(lost) - 1
        colour = _COLOURS[k % len(_COLOURS)]
        ranks = entry.rank if isinstance(entry.rank, tuple) else () if entry.rank is None else (entry.rank,)
        chosen = f"rank {'x'.join(map(str, ranks))}" if ranks else "dense"
        axes.plot([r / full for r in range(full + 1)], lost, color=colour, label=f"{entry.name} ({chosen})")
        if ranks and max(ranks) <= full:
            axes.plot(max(ranks) / full, lost[max(ranks)], "o", color=colour)
    axes.set(yscale="log", xlabel="rank / full rank", ylabel="relative error of the output", title="Spectra and ranks")
    axes.legend(fontsize="small")
    return axes


def accuracy_against_size(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    dense: tuple[int, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
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
        axes.plot(*dense, "k*", markersize=12, label="dense")
        axes.legend(fontsize="small")
    axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy, %", title="Accuracy against size")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}), minor=False)
    axes.tick_params(axis="x", labelrotation=45)
    return axes


def losses(curves: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Axes:
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
    return axes


def recovery(result: Recovery, *, ax: Axes | None = None) -> Axes:
    """Plots the objective and the held-out scores of a recovery against its steps, and marks the state that was kept.

    Args:
        result: what :func:`recover_` returned.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    axes = panels(1)[0] if ax is None else ax
    axes.plot(range(1, len(result.losses) + 1), result.losses, color=_COLOURS[0], label="objective")
    axes.set(xlabel="step", ylabel="objective", title="Recovery")
    lines = list(axes.get_lines())
    if result.scores:
        right = axes.twinx()
        lines += right.plot(*zip(*result.scores, strict=True), "o-", color=_COLOURS[1], label="held-out score")
        lines += right.plot(
            [result.best_step], [dict(result.scores)[result.best_step]], "k*", markersize=12, label="kept"
        )
        right.set_ylabel("held-out score")
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize="small")
    return axes


def progression(result: Progression, *, ax: Axes | None = None) -> Axes:
    """Plots the held-out scores of a progressive decomposition against parameters, and marks the model that was kept.

    Args:
        result: what :func:`progressive_` returned, with scores.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if nothing was scored.
        MissingExtraError: if matplotlib is not installed.
    """
    if result.score is None:
        raise LowRankError("progression: got a history without scores, expected validation= or score= in progressive_.")
    axes = panels(1)[0] if ax is None else ax
    sizes, scores, factorized = [result.params], [result.score], []
    for stage in result.stages:
        assert stage.score is not None
        assert stage.factorized_score is not None
        sizes.append(stage.params)
        scores.append(stage.score)
        factorized.append(stage.factorized_score)
    axes.plot(sizes[1:], factorized, "o--", color=_COLOURS[1], label="factorized")
    axes.plot(sizes, scores, "o-", color=_COLOURS[0], label="recovered")
    axes.plot([sizes[result.kept]], [scores[result.kept]], "k*", markersize=12, label="the model")
    axes.set(xscale="log", xlabel="parameters", ylabel="held-out score", title="Progressive decomposition")
    axes.legend(fontsize="small")
    return axes


def perplexity_against_bytes(curves: Mapping[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Axes:
    """Plots perplexity against the size of a key/value cache, one line per kind of cache.

    Args:
        curves: for each label the points ``(bytes, perplexity)``.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points.
        MissingExtraError: if matplotlib is not installed.
    """
    axes = _lines("perplexity_against_bytes", _scaled(curves, 1024), ax, "o-")
    axes.set(xscale="log", xlabel="cache, KiB", ylabel="perplexity", title="Perplexity against bytes")
    return axes


def loss_against_wire_bytes(curves: Mapping[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Axes:
    """Plots the training loss against the bytes sent per process, one line per way to average gradients.

    Args:
        curves: for each label the points ``(bytes sent so far, loss)``.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no points.
        MissingExtraError: if matplotlib is not installed.
    """
    axes = _lines("loss_against_wire_bytes", _scaled(curves, 2**20), ax)
    axes.set(xscale="log", xlabel="sent per process, MiB", ylabel="training loss", title="Loss against bytes")
    return axes


def save_figure(axes: Axes, path: str | os.PathLike[str]) -> None:
    """Saves the whole figure that the axes belong to.

    Args:
        axes: any axes of the figure.
        path: the file to write; its suffix is the format.
    """
    figure: Any = axes.figure
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _lines(name: str, curves: Mapping[str, Iterable[tuple[float, float]]], ax: Axes | None, style: str = "-") -> Axes:
    """Draws one line per label through its points, sorted by their first coordinate."""
    points = {label: sorted(curve) for label, curve in curves.items()}
    if not any(points.values()):
        raise LowRankError(f"{name}: got no points, expected at least one.")
    axes = panels(1)[0] if ax is None else ax
    for k, (label, curve) in enumerate(points.items()):
        axes.plot([x for x, _ in curve], [y for _, y in curve], style, color=_COLOURS[k % len(_COLOURS)], label=label)
    axes.legend(fontsize="small")
    return axes


def _scaled(curves: Mapping[str, Sequence[tuple[int, float]]], unit: int) -> dict[str, list[tuple[float, float]]]:
    """The same points with their first coordinate in ``unit`` bytes."""
    return {label: [(size / unit, value) for size, value in points] for label, points in curves.items()}
