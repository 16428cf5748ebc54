"""Scaling by powers of two, so that squares neither overflow nor vanish."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from .sparse import SparseMatrix


def unit_scale(tensor: Tensor) -> float:
    """Returns the power of two that scales the largest magnitude to between 1 and 2; 1.0 for zeros.

    Dividing by it is exact. Squares and Gram matrices of the result are finite, and those of its largest entries do not
    vanish. If all entries are denormal, the largest magnitude stays below 1.

    Args:
        tensor: finite tensor in fp32 or fp64.

    Examples:
        >>> unit_scale(torch.tensor([3.0, -24.0, 1.0]))
        16.0
    """
    largest = max(map(abs, map(float, tensor.aminmax()))) if tensor.numel() else 0.0
    # both the scale and its reciprocal have to be normal numbers of the dtype
    limit = -math.frexp(torch.finfo(tensor.dtype).tiny)[1] + 1
    exponent = min(max(math.frexp(largest)[1] - 1, -limit), limit)
    return math.ldexp(1.0, exponent) if largest > 0 else 1.0


@overload
def scaled_to_unit(matrix: Tensor) -> tuple[Tensor, float]: ...


@overload
def scaled_to_unit(matrix: SparseMatrix) -> tuple[SparseMatrix, float]: ...


@overload
def scaled_to_unit(matrix: Tensor | SparseMatrix) -> tuple[Tensor | SparseMatrix, float]: ...


def scaled_to_unit(matrix: Tensor | SparseMatrix) -> tuple[Tensor | SparseMatrix, float]:
    """Divides a tensor by its :func:`unit_scale`, and returns both."""
    scale = unit_scale(matrix if isinstance(matrix, Tensor) else matrix.values)
    return matrix / scale, scale


def to_unit(matrices: Tensor) -> Tensor:
    """Scales each matrix of a stack to a largest entry of 1; zeros stay zeros."""
    size = matrices.abs().amax((-2, -1), keepdim=True)
    return matrices / torch.where(size > 0, size, 1.0)
