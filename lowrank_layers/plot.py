"""Every picture. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .calibrate.statistics import Statistics
from .compress.candidates import Candidate
from .compress.plan import Plan
from .errors import LowRankError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# one hue a layer, readable without colour vision (Okabe and Ito, 2008)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def panels(count: int) -> list[Axes]:
    """That many axes side by side in a new figure.

    Raises:
        MissingExtraError: without matplotlib.
    """
    return list(_pyplot().subplots(1, count, figsize=(5.5 * count, 4.2), squeeze=False)[1][0])


def spectra(model: nn.Module, plan: Plan, stats: Statistics | None = None, *, ax: Axes | None = None) -> Axes:
    """Loss that each rank leaves out, layer by layer, with the rank that the plan chose.

    Args:
        model: the dense model that the plan was made for.
        plan: whose layers are drawn.
        stats: weights the spectra, as in :func:`make_plan`.
        ax: where to draw; a new figure by default.

    Raises:
        MissingExtraError: without matplotlib.
    """
    axes = ax if ax is not None else panels(1)[0]
    for k, entry in enumerate(plan):
        known = None if stats is None else stats[entry.name]
        layer = Candidate(model.get_submodule(entry.name), known, damping=plan.damping)
        tails = torch.stack(layer.tails).sum(0)
        lost = (tails / tails[0]).clamp_min(1e-6).sqrt().tolist()
        colour = _COLOURS[k % len(_COLOURS)]
        axes.plot(
            [r / (len(lost) - 1) for r in range(len(lost))], lost, color=colour, label=_label(entry.name, entry.rank)
        )
        rank = max(entry.rank) if isinstance(entry.rank, tuple) else entry.rank
        if rank is not None and rank < len(lost):
            axes.plot(rank / (len(lost) - 1), lost[rank], "o", color=colour)
    axes.set(
        yscale="log", xlabel="rank / full rank", ylabel="relative error of the output", title="Spectra, chosen ranks"
    )
    axes.legend(fontsize="small")
    return axes


def accuracy_against_size(
    curves: dict[str, Sequence[tuple[int, float]]], *, dense: tuple[int, float] | None = None, ax: Axes | None = None
) -> Axes:
    """One line a method: accuracy over the number of parameters.

    Args:
        curves: label to points ``(parameters, accuracy in percent)``.
        dense: the point of the dense model.
        ax: where to draw; a new figure by default.

    Raises:
        LowRankError: if there is no point.
        MissingExtraError: without matplotlib.
    """
    if not any(curves.values()):
        raise LowRankError("accuracy_against_size: got no points.")
    axes = ax if ax is not None else panels(1)[0]
    for k, (label, points) in enumerate(curves.items()):
        sizes, accuracies = zip(*sorted(points), strict=True)
        axes.plot(sizes, accuracies, "o-", color=_COLOURS[k % len(_COLOURS)], label=label)
    if dense is not None:
        axes.plot(*dense, "k*", markersize=12, label="dense")
    axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy, %", title="Accuracy against size")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}), minor=False)
    axes.tick_params(axis="x", labelrotation=45)
    axes.legend(fontsize="small")
    return axes


def losses(curves: dict[str, Sequence[float]], *, ax: Axes | None = None) -> Axes:
    """One line a run: the training loss of every step.

    Args:
        curves: label to losses.
        ax: where to draw; a new figure by default.

    Raises:
        LowRankError: if there is no point.
        MissingExtraError: without matplotlib.
    """
    if not any(curves.values()):
        raise LowRankError("losses: got no points.")
    axes = ax if ax is not None else panels(1)[0]
    for k, (label, points) in enumerate(curves.items()):
        axes.plot(range(1, len(points) + 1), points, color=_COLOURS[k % len(_COLOURS)], label=label)
    axes.set(xlabel="step", ylabel="training loss", title="Fine-tuning")
    axes.legend(fontsize="small")
    return axes


def perplexity_against_bytes(curves: dict[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Axes:
    """One line a kind of key/value cache: perplexity over its bytes.

    Args:
        curves: label to points ``(bytes, perplexity)``.
        ax: where to draw; a new figure by default.

    Raises:
        LowRankError: if there is no point.
        MissingExtraError: without matplotlib.
    """
    if not any(curves.values()):
        raise LowRankError("perplexity_against_bytes: got no points.")
    axes = ax if ax is not None else panels(1)[0]
    for k, (label, points) in enumerate(curves.items()):
        sizes, values = zip(*sorted(points), strict=True)
        axes.plot([size / 1024 for size in sizes], values, "o-", color=_COLOURS[k % len(_COLOURS)], label=label)
    axes.set(xscale="log", xlabel="cache, KiB", ylabel="perplexity", title="Perplexity against bytes")
    axes.legend(fontsize="small")
    return axes


def loss_against_wire_bytes(curves: dict[str, Sequence[tuple[int, float]]], *, ax: Axes | None = None) -> Axes:
    """One line a way to average gradients: the training loss over the bytes that a process sent until then.

    Args:
        curves: label to points ``(bytes, loss)``, step by step.
        ax: where to draw; a new figure by default.

    Raises:
        LowRankError: if there is no point.
        MissingExtraError: without matplotlib.
    """
    if not any(curves.values()):
        raise LowRankError("loss_against_wire_bytes: got no points.")
    axes = ax if ax is not None else panels(1)[0]
    for k, (label, points) in enumerate(curves.items()):
        sent, values = zip(*sorted(points), strict=True)
        axes.plot([size / 2**20 for size in sent], values, color=_COLOURS[k % len(_COLOURS)], label=label)
    axes.set(xscale="log", xlabel="sent by a process, MiB", ylabel="training loss", title="Loss against bytes")
    axes.legend(fontsize="small")
    return axes


def save_figure(axes: Axes, path: str | os.PathLike[str]) -> None:
    """Writes the whole figure that ``axes`` belongs to."""
    figure: Any = axes.figure
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _label(name: str, rank: Any) -> str:
    return (
        f"{name} (dense)"
        if rank is None
        else f"{name} (rank {'x'.join(map(str, rank)) if isinstance(rank, tuple) else rank})"
    )


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingExtraError("plots need matplotlib; install lowrank-layers[plot].") from None
    return plt
