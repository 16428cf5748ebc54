"""Scales under which squares neither overflow nor vanish."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from .sparse import SparseMatrix


def unit_scale(tensor: Tensor) -> float:
    """A power of two, so that dividing by it is exact and leaves a largest magnitude between 1 and 2; 1.0 for zeros.

    Squares and Gram matrices of what is left stay finite, and those of the largest entries do not vanish. Where all
    entries are denormal, the largest one is below 1.

    Args:
        tensor: finite, of fp32 or fp64.

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
    """What is left of a tensor divided by its :func:`unit_scale`, and that scale."""
    scale = unit_scale(matrix if isinstance(matrix, Tensor) else matrix.values)
    return matrix / scale, scale


def to_unit(matrices: Tensor) -> Tensor:
    """Each matrix of a stack with a largest entry of 1, so that no square overflows or vanishes; zeros stay zeros."""
    size = matrices.abs().amax((-2, -1), keepdim=True)
    return matrices / torch.where(size > 0, size, 1.0)
