"""Spectra: singular values, and errors of layers against their ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..calibrate.statistics import Statistics
from ..compress.candidates import Candidate
from ..compress.plan import Plan
from ..decompose import svd
from ..drawing import colour, figure_of, legend, logarithmic, panels
from ..linalg import check_matrix
from ..rank import Rank
from ..spectrum import MatrixSpectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def spectra(model: nn.Module, plan: Plan, stats: Statistics | None = None, *, ax: Axes | None = None) -> Figure:
    """Plots the relative error of each layer against its rank, and marks the rank that the plan chose.

    More than a dozen layers are drawn without a legend, which would cover them; :func:`plan` names their ranks.

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
        hue = colour(k)
        ranks = entry.rank if isinstance(entry.rank, tuple) else () if entry.rank is None else (entry.rank,)
        chosen = f"rank {'x'.join(map(str, ranks))}" if ranks else "dense"
        axes.plot([r / full for r in range(full + 1)], lost, color=hue, label=f"{entry.name} ({chosen})")
        if ranks and max(ranks) <= full:
            axes.plot(max(ranks) / full, lost[max(ranks)], "o", color=hue)
    axes.set(xlabel="rank / full rank", ylabel="relative error of the output", title="Spectra and ranks")
    logarithmic(axes, "y")
    legend(axes)
    return figure_of(axes)


def singular_values(matrix: Tensor, rank: Rank | None = None) -> Figure:
    """Plots the singular values of a matrix beside the energy that each rank keeps, and marks a rank in both.

    Args:
        matrix: the matrix.
        rank: the rank to mark, or a rule that chooses it.

    Shape:
        ``[m, n]``.

    Raises:
        LowRankError: for what is not a matrix or not a rank.
        MissingExtraError: if matplotlib is not installed.
    """
    check_matrix(matrix, "singular_values")
    values = svd(matrix).s.detach().cpu().double()
    return MatrixSpectrum(values, (matrix.shape[0], matrix.shape[1])).plot(rank)
