"""Scales under which squares neither overflow nor vanish."""

import math

import torch
from torch import Tensor


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


def scaled_to_unit(tensor: Tensor) -> tuple[Tensor, float]:
    """The tensor divided by its :func:`unit_scale`, and that scale."""
    scale = unit_scale(tensor)
    return tensor / scale, scale
