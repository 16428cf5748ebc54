"""Tensors with three axes as points in space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_type
from ..drawing import SIGNED, figure_of, row
from ..errors import LowRankError
from ..factors import Factorization, Tucker

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tensor_scatter(tensor: Tensor, found: Factorization) -> Figure:
    """Draws a tensor, its core where it has one, and its reconstruction, one point per value.

    The colour is the value, the area of a point its size. Tensor and reconstruction have the same colours.

    Args:
        tensor: the tensor.
        found: its factorization.

    Shape:
        ``[a, b, c]``, of at most a few thousand values.

    Raises:
        LowRankError: for a tensor without three axes, or a factorization of another shape.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(tensor, Tensor, "tensor_scatter", "a torch.Tensor")
    check_type(found, Factorization, "tensor_scatter", "a factorization, such as that of svd")
    if tensor.ndim != 3:
        raise LowRankError(f"tensor_scatter: got shape {tuple(tensor.shape)}, expected a tensor with three axes.")
    error = found.relative_error(tensor)
    drawn = {"original": tensor, f"reconstruction (error {error:.2%})": found.to_dense()}
    if isinstance(found, Tucker):
        drawn = {"original": tensor, "core": found.core, f"reconstruction (error {error:.2%})": found.to_dense()}
    bound = float(tensor.abs().max())
    panels = row(len(drawn), width=3.8, height=3.6, subplot_kw={"projection": "3d"})
    for axes, (title, each) in zip(panels, drawn.items(), strict=True):
        _points(axes, each.detach().cpu().double(), title, float(each.abs().max()) if title == "core" else bound)
    return figure_of(panels[0])


def _points(axes: Any, values: Tensor, title: str, bound: float) -> None:
    """One panel: a point per value, in colours from ``-bound`` to ``bound``."""
    from matplotlib.ticker import MaxNLocator

    places = torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).unbind(1)
    flat = values.flatten()
    areas = 4 + 60 * flat.abs() / max(bound, 1e-300)
    colours = {"cmap": SIGNED, "vmin": -bound, "vmax": bound}
    points = axes.scatter(*(each.tolist() for each in places), c=flat.tolist(), s=areas.tolist(), alpha=0.8, **colours)
    axes.set_title(f"{title}, {' x '.join(map(str, values.shape))}", fontsize="medium")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set_pane_color((0.5, 0.5, 0.5, 0.1))
    figure_of(axes).colorbar(points, ax=axes, shrink=0.6, pad=0.12)
