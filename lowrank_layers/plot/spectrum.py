"""Spectra: singular values, and errors of layers against their ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..calibrate.statistics import Statistics
from ..checks import check_type
from ..compress.candidates import Candidate
from ..compress.damping import Damping
from ..compress.plan import Plan
from ..decompose import svd
from ..drawing import colour, figure_of, given_or_new, legend, logarithmic
from ..errors import LowRankError
from ..layers import FactoredModule
from ..linalg import check_matrix
from ..modules import opened_attentions
from ..rank import Rank
from ..spectrum import MatrixSpectrum
from ..spectrum.weights import has_matrix

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
        LowRankError: for a plan or statistics of another model.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(model, nn.Module, "spectra", "the dense model")
    check_type(plan, Plan, "spectra", "a plan of make_plan")
    with opened_attentions(model):
        curves = [_lost(model, entry.name, stats, plan.damping) for entry in plan]
    axes = given_or_new(ax, "spectra")
    for k, (entry, lost) in enumerate(zip(plan, curves, strict=True)):
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


def _lost(model: nn.Module, name: str, stats: Statistics | None, damping: Damping) -> list[float]:
    """Relative errors of a layer's output at the ranks from 0 on."""
    layer = dict(model.named_modules()).get(name)
    if layer is None or isinstance(layer, FactoredModule) or not has_matrix(layer):
        raise LowRankError(f"spectra: {name!r} of the plan is no dense layer of the model; give that of make_plan.")
    if stats is not None and name not in stats:
        raise LowRankError(f"spectra: {name!r} of the plan is not in the statistics; give those it was made with.")
    tails = torch.stack(Candidate(layer, None if stats is None else stats[name], damping=damping).tails).sum(0)
    return (tails / tails[0]).clamp_min(1e-6).sqrt().tolist()


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
