"""Kernels of convolutions of any dimension and direction in one layout: ``[groups, out, in, *k]``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .base import weight_of

ConvNd = nn.modules.conv._ConvNd
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The plain convolutions by their number of spatial dimensions."""


def kernel_of(conv: nn.Module) -> Tensor:
    """The weight of any convolution as ``[groups, out / groups, in / groups, *k]``."""
    assert isinstance(conv, ConvNd)
    weight: Tensor = weight_of(conv).unflatten(0, (conv.groups, -1))
    return weight.transpose(1, 2) if conv.transposed else weight


def weight_of_kernel(kernel: Tensor, *, transposed: bool) -> Tensor:
    """The way back: torch.nn's ``[out, in / groups, *k]``, or ``[in, out / groups, *k]`` of a transposed one."""
    return (kernel.transpose(1, 2) if transposed else kernel).flatten(0, 1)


def matrix_of(kernel: Tensor, first: Sequence[int]) -> Tensor:
    """The kernel as a matrix from what a first convolution sees to what a second one makes of it.

    Args:
        kernel: ``[groups, out, in, *k]``.
        first: the spatial axes that belong to the first one.

    Shape:
        ``[groups, out * (axes of the second), in * (axes of the first)]``.
    """
    axes = range(kernel.ndim - 3)
    rows = [1, *(axis + 3 for axis in axes if axis not in first)]
    columns = [2, *(axis + 3 for axis in first)]
    return kernel.permute(0, *rows, *columns).flatten(len(rows) + 1).flatten(1, len(rows))


def kernel_of_matrix(matrix: Tensor, shape: Sequence[int], first: Sequence[int]) -> Tensor:
    """Undoes :func:`matrix_of`; ``shape`` is the kernel's."""
    second = [axis for axis in range(len(shape) - 3) if axis not in first]
    order = [0, 1, *(axis + 3 for axis in second), 2, *(axis + 3 for axis in first)]
    kernel = matrix.reshape([matrix.shape[0], *(shape[axis] for axis in order[1:])])
    return kernel.permute([order.index(axis) for axis in range(len(shape))])


def pair_kernels(last: Tensor, first: Tensor, shape: Sequence[int], axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The kernels of the second and the first convolution of a pair.

    Args:
        last: ``[groups, rows, r]``, rows as :func:`matrix_of` has them.
        first: ``[groups, r, columns]``.
        shape: shape of the whole kernel.
        axes: the spatial axes that belong to the first one.

    Shape:
        ``[groups, out, r, *k]`` and ``[groups, r, in, *k]``, with 1 on the axes of the other.
    """
    g, out, into, *k = shape
    rank = first.shape[1]
    inner = [n if axis in axes else 1 for axis, n in enumerate(k)]
    outer = [1 if axis in axes else n for axis, n in enumerate(k)]
    return last.reshape(g, out, *outer, rank).movedim(-1, 2), first.reshape(g, rank, into, *inner)


def factors_of_pair(last: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Undoes :func:`pair_kernels`: ``[groups, rows, r]`` and ``[groups, r, columns]``."""
    return last.movedim(2, -1).flatten(1, -2), first.flatten(2)


def linear_axes(conv: nn.Module) -> tuple[int, ...]:
    """How a convolution is a linear layer: on patches of its input; a transposed one, to patches of its output."""
    assert isinstance(conv, ConvNd)
    return () if conv.transposed else tuple(range(len(conv.kernel_size)))


def kernel_size_of(conv: nn.Module) -> tuple[int, ...]:
    """The size of its kernel along each axis."""
    assert isinstance(conv, ConvNd)
    return conv.kernel_size


def kernel_area(conv: nn.Module) -> int:
    """Positions of a kernel."""
    return math.prod(kernel_size_of(conv))
