"""The factors of CP and of NMF as heat maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..checks import check_type
from ..drawing import SIGNED, figure_of, row
from ..factors import CP, NMF
from .images import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cp_factors(found: CP) -> Figure:
    """Draws the factor of each mode as a heat map, one column per component, all in the same colours.

    Args:
        found: the decomposition.

    Raises:
        LowRankError: for what is no CP decomposition.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(found, CP, "cp_factors", "what cp returned")
    factors = [factor.detach().cpu().double() for factor in found.factors]
    bound = max(float(factor.abs().max()) for factor in factors)
    panels = row(len(factors), width=3.2, height=3.6)
    for mode, (axes, factor) in enumerate(zip(panels, factors, strict=True)):
        heat_map(axes, factor, f"mode {mode}", -bound, bound, cmap=SIGNED)
        axes.set(xlabel="component", ylabel="index")
    figure = figure_of(panels[0])
    figure.colorbar(panels[-1].images[0], ax=panels, shrink=0.8)
    return figure


def nmf_factors(matrix: Tensor, found: NMF) -> Figure:
    """Draws a matrix, its non-negative factors ``W`` and ``H``, and their product, which has the matrix's colours.

    Args:
        matrix: the matrix.
        found: its factorization.

    Shape:
        ``[m, n]``.

    Raises:
        LowRankError: for what is no NMF, or one of another shape.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(found, NMF, "nmf_factors", "what nmf returned")
    error = found.relative_error(matrix)
    dense, w, h, close = (each.detach().cpu().double() for each in (matrix, found.w, found.h, found.to_dense()))
    panels = row(4, width=3.0, height=3.2)
    top = float(dense.max())
    heat_map(panels[0], dense, "original", 0, top)
    heat_map(panels[1], w, "basis W", 0, float(w.max()))
    heat_map(panels[2], h, "coefficients H", 0, float(h.max()))
    heat_map(panels[3], close, f"W H (error {error:.2%})", 0, top)
    panels[1].set(xlabel="component")
    panels[2].set(ylabel="component")
    for axes in panels:
        figure_of(axes).colorbar(axes.images[0], ax=axes, shrink=0.8)
    return figure_of(panels[0])
