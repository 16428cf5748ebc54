"""Gradients as stacks of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SHORTEST_STACKED = 32
"""Of three dimensions the last is a kernel's where it is shorter, and a matrix' in a stack of them from here on."""


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int] | None:
    """``(stack, rows, columns)`` of a gradient; ``None`` for scalars, vectors, and what is empty.

    Stacks of experts are taken one by one. A convolution's kernel dimensions go to the output or the input channels,
    whichever way rows and columns, and so the factors of a given rank, are fewest.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    if _stacked(shape):
        return shape[0], shape[1], shape[2]
    order = _order(shape)
    to_rows = order.index(1)
    return 1, math.prod(shape[i] for i in order[:to_rows]), math.prod(shape[i] for i in order[to_rows:])


def matrices_of(gradient: Tensor) -> Tensor:
    """``[stack, rows, columns]``; a view where it can be one."""
    shape = matrix_shape(gradient.shape)
    assert shape is not None
    return (
        gradient.reshape(shape) if _stacked(gradient.shape) else gradient.permute(_order(gradient.shape)).reshape(shape)
    )


def gradient_of(matrices: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse of :func:`matrices_of`."""
    if _stacked(shape):
        return matrices.reshape(shape)
    order = _order(shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    return matrices.reshape([shape[i] for i in order]).permute(back)


def times(matrix: Tensor, thin: Tensor) -> Tensor:
    """``matrix @ thin``: BLAS takes the transposed product 2 to 10 times as fast where ``thin`` has few columns."""
    return torch.bmm(thin.mT.contiguous(), matrix.mT).mT


def _stacked(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[2] >= SHORTEST_STACKED


def _order(shape: Sequence[int]) -> list[int]:
    """Dimensions of ``[out, in, ...]`` in the order of rows, then columns: those from ``in`` on are columns."""

    def size(kernels: int) -> int:
        return shape[0] * math.prod(shape[2 : 2 + kernels]) + shape[1] * math.prod(shape[2 + kernels :])

    kernels = min(range(len(shape) - 1), key=size)
    return [0, *range(2, 2 + kernels), 1, *range(2 + kernels, len(shape))]
