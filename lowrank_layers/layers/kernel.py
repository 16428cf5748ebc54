"""Kernels of plain and transposed convolutions in one layout, ``[groups, out, in, *k]``, and as matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .weights import weight_of

ConvNd = nn.modules.conv._ConvNd
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Torch's convolutions by number of spatial dimensions."""


def kernel_of(conv: nn.Module) -> Tensor:
    """Returns the weight of a convolution as ``[groups, out / groups, in / groups, *k]``."""
    assert isinstance(conv, ConvNd)
    weight: Tensor = weight_of(conv).unflatten(0, (conv.groups, -1))
    return weight.transpose(1, 2) if conv.transposed else weight


def weight_of_kernel(kernel: Tensor, *, transposed: bool) -> Tensor:
    """Inverse of :func:`kernel_of`: ``[out, in / groups, *k]``, or ``[in, out / groups, *k]`` if transposed."""
    return (kernel.transpose(1, 2) if transposed else kernel).flatten(0, 1)


def matrix_of(kernel: Tensor, first: Sequence[int]) -> Tensor:
    """Matricizes a kernel: columns run over (in, axes of the first convolution), rows over (out, axes of the second).

    Args:
        kernel: ``[groups, out, in, *k]``.
        first: the spatial axes of the first convolution.

    Shape:
        ``[groups, out * (axes of the second), in * (axes of the first)]``.
    """
    axes = range(kernel.ndim - 3)
    rows = [1, *(axis + 3 for axis in axes if axis not in first)]
    columns = [2, *(axis + 3 for axis in first)]
    return kernel.permute(0, *rows, *columns).flatten(len(rows) + 1).flatten(1, len(rows))


def kernel_of_matrix(matrix: Tensor, shape: Sequence[int], first: Sequence[int]) -> Tensor:
    """Inverse of :func:`matrix_of`.

    Args:
        matrix: ``[groups, rows, columns]``.
        shape: shape of the kernel.
        first: the spatial axes of the first convolution.
    """
    second = [axis for axis in range(len(shape) - 3) if axis not in first]
    order = [0, 1, *(axis + 3 for axis in second), 2, *(axis + 3 for axis in first)]
    kernel = matrix.reshape([matrix.shape[0], *(shape[axis] for axis in order[1:])])
    return kernel.permute([order.index(axis) for axis in range(len(shape))])


def pair_kernels(last: Tensor, first: Tensor, shape: Sequence[int], axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Kernels of the two convolutions of a pair, the second one first.

    Args:
        last: ``[groups, rows, r]``, with rows as in :func:`matrix_of`.
        first: ``[groups, r, columns]``.
        shape: shape of the whole kernel.
        axes: the spatial axes of the first convolution.

    Shape:
        ``[groups, out, r, *k]`` and ``[groups, r, in, *k]``, of size 1 along the axes of the other.
    """
    g, out, into, *k = shape
    rank = first.shape[1]
    inner = [n if axis in axes else 1 for axis, n in enumerate(k)]
    outer = [1 if axis in axes else n for axis, n in enumerate(k)]
    return last.reshape(g, out, *outer, rank).movedim(-1, 2), first.reshape(g, rank, into, *inner)


def factors_of_pair(last: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pair_kernels`: ``[groups, rows, r]`` and ``[groups, r, columns]``."""
    return last.movedim(2, -1).flatten(1, -2), first.flatten(2)


def linear_axes(conv: nn.Module) -> tuple[int, ...]:
    """Axes that make a convolution a linear map: of patches of its input, or if transposed to patches of its output."""
    assert isinstance(conv, ConvNd)
    return () if conv.transposed else tuple(range(len(conv.kernel_size)))


def kernel_size_of(conv: nn.Module) -> tuple[int, ...]:
    """Returns the kernel size of a convolution along each axis."""
    assert isinstance(conv, ConvNd)
    return conv.kernel_size


def kernel_area(conv: nn.Module) -> int:
    """Number of positions in the kernel of a convolution."""
    return math.prod(kernel_size_of(conv))
