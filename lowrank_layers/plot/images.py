"""Matrices and pictures as images: side by side, and beside their approximation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..checks import check_type
from ..drawing import SIGNED, figure_of, row
from ..errors import LowRankError
from ..factors import SVD, Factorization

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def image_strip(pictures: Mapping[str, Tensor]) -> Figure:
    """Draws pictures side by side, each under its title.

    Args:
        pictures: for each title the values from 0 to 1; those outside are cut.

    Shape:
        ``[H, W]`` for shades of grey, ``[H, W, 3]`` for colours.

    Raises:
        LowRankError: if there are no pictures, and for what is no tensor or has another shape.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(pictures, Mapping, "image_strip", "a dict of pictures by their titles")
    if not pictures:
        raise LowRankError("image_strip: got no pictures, expected at least one.")
    for title, picture in pictures.items():
        if not isinstance(picture, Tensor):
            raise LowRankError(
                f"image_strip: got {type(picture).__name__} for {title!r}, expected a torch.Tensor; for an array"
                " there is torch.as_tensor."
            )
        if picture.ndim != 2 and (picture.ndim != 3 or picture.shape[2] != 3):
            raise LowRankError(
                f"image_strip: got shape {tuple(picture.shape)} for {title!r}, expected [H, W] or [H, W, 3]."
                " Permute channels to the end."
            )
    panels = row(len(pictures), width=2.6, height=2.9)
    for axes, (title, picture) in zip(panels, pictures.items(), strict=True):
        axes.imshow(picture.detach().cpu().float().clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize="medium")
        axes.axis("off")
    return figure_of(panels[0])


def approximation(matrix: Tensor, found: Factorization) -> Figure:
    """Draws a matrix, its approximation by factors in the same colours, and the error in colours of its own.

    Args:
        matrix: the matrix.
        found: its factorization.

    Shape:
        ``[m, n]``.

    Raises:
        LowRankError: for what is not a matrix, or a factorization of another shape.
        MissingExtraError: if matplotlib is not installed.
    """
    check_type(matrix, Tensor, "approximation", "a torch.Tensor")
    check_type(found, Factorization, "approximation", "a factorization, such as that of svd")
    if matrix.ndim != 2:
        raise LowRankError(
            f"approximation: got a tensor of shape {tuple(matrix.shape)}, expected a matrix."
            " For tensors with three axes there is tensor_scatter."
        )
    error = found.relative_error(matrix)
    dense = matrix.detach().cpu().double()
    close = found.to_dense().detach().cpu().double()
    rank = f"rank {found.rank}" if isinstance(found, SVD) else type(found).__name__
    left, middle, right = row(3, width=3.4, height=3.4)
    low, high = float(dense.min()), float(dense.max())
    for axes, values, title in ((left, dense, "original"), (middle, close, rank)):
        heat_map(axes, values, title, low, high)
    bound = float((dense - close).abs().max())
    heat_map(right, dense - close, f"error {error:.2%}", -bound, bound, cmap=SIGNED)
    for axes in (middle, right):
        figure_of(axes).colorbar(axes.images[0], ax=axes, shrink=0.8)
    return figure_of(left)


def heat_map(axes: Axes, values: Tensor, title: str, low: float, high: float, cmap: str = "viridis") -> None:
    """Draws a matrix in colours from ``low`` to ``high``, its axes at a few whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.imshow(values.numpy(), cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize="medium")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
