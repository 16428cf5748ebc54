"""What changes with the rank: error, compression ratio, and stability over restarts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..checks import check_type
from ..drawing import colour, figure_of, given_or_new, ink, panels, whole_x
from ..errors import LowRankError
from ..factors import CP, NMF, SVD, Tucker
from ..rank.consensus import consensus_matrix, cophenetic_correlation, dispersion
from ..rank.factor_match import factor_match_score
from .labelled import labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def error_against_rank(tensor: Tensor, fits: Mapping[str, Sequence[SVD | CP | NMF | Tucker]]) -> Figure:
    """Plots the relative error of factorizations against their rank, beside the ratio by which they compress.

    The ratio is the number of values of the tensor over that of its factors; below 1 nothing is saved.

    Args:
        tensor: the tensor that was factorized.
        fits: for each label the factorizations at several ranks; the rank of a Tucker decomposition is its largest.

    Raises:
        LowRankError: if there are no factorizations, or for what is none or has another shape.
        MissingExtraError: if matplotlib is not installed.
    """
    groups = labelled(fits, "error_against_rank", "factorizations")
    for fit in (fit for each in groups.values() for fit in each):
        check_type(fit, (SVD, CP, NMF, Tucker), "error_against_rank", "factorizations of svd, cp, nmf or tucker")
    points = {
        label: sorted((_rank(fit), fit.relative_error(tensor), tensor.numel() / fit.numel()) for fit in each)
        for label, each in groups.items()
    }
    if not any(points.values()):
        raise LowRankError("error_against_rank: got no factorizations, expected at least one.")
    left, right = panels(2)
    for k, (label, each) in enumerate(points.items()):
        ranks = [rank for rank, _, _ in each]
        left.plot(ranks, [error for _, error, _ in each], "o-", color=colour(k), markersize=4, label=label)
        right.plot(ranks, [ratio for _, _, ratio in each], "o-", color=colour(k), markersize=4, label=label)
    right.axhline(1, color=ink(), linestyle=":", label="as large as the tensor")
    left.set(xlabel="rank", ylabel="relative error", ylim=(0, None), title="Error")
    right.set(xlabel="rank", ylabel="compression ratio", ylim=(0, None), title="Compression")
    for axes in (left, right):
        whole_x(axes)
        axes.legend(fontsize="small")
    return figure_of(left)


def stability_against_rank(
    tensor: Tensor, fits: Mapping[int, Sequence[CP] | Sequence[NMF]], *, ax: Axes | None = None
) -> Figure:
    """Plots how well factorizations from several starts agree, against their rank.

    Shown are the median :func:`factor_match_score` with the start of least error, as in :class:`FactorMatch`, and for
    NMF :func:`dispersion` and :func:`cophenetic_correlation` of the consensus, as in :class:`ConsensusStability`.

    Args:
        tensor: the tensor that was factorized.
        fits: for each rank the factorizations from different starts, at least two.
        ax: the axes to draw on; by default those of a new figure.

    Raises:
        LowRankError: if there are no ranks, for a single start, or for what is no factorization or has another shape.
        MissingExtraError: if matplotlib is not installed.
    """
    groups = labelled(fits, "stability_against_rank", "factorizations")
    if not groups or min(map(len, groups.values())) < 2:
        raise LowRankError("stability_against_rank: expected at least one rank, with at least two starts each.")
    for fit in (fit for starts in groups.values() for fit in starts):
        check_type(fit, (CP, NMF), "stability_against_rank", "factorizations of cp or nmf")
    lines: dict[str, list[tuple[int, float]]] = {}
    for rank, starts in sorted(groups.items()):
        others: list[CP | NMF] = sorted(starts, key=lambda fit: fit.relative_error(tensor))
        best = others.pop(0)
        match = statistics.median(factor_match_score(best, fit) for fit in others)
        lines.setdefault("factor match score", []).append((rank, match))
        if all(isinstance(fit, NMF) for fit in starts):
            consensus = consensus_matrix([fit for fit in starts if isinstance(fit, NMF)])
            lines.setdefault("dispersion", []).append((rank, dispersion(consensus)))
            lines.setdefault("cophenetic correlation", []).append((rank, cophenetic_correlation(consensus)))
    axes = given_or_new(ax, "stability_against_rank")
    for k, (label, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), "o-", color=colour(k), label=label)
    axes.set(xlabel="rank", ylabel="agreement of the starts", ylim=(0, 1.04), title="Stability")
    whole_x(axes)
    axes.legend(fontsize="small")
    return figure_of(axes)


def _rank(fit: SVD | CP | NMF | Tucker) -> int:
    return max(fit.rank) if isinstance(fit, Tucker) else fit.rank
