"""Stand-ins for zero in the updates."""

from __future__ import annotations

import torch
from torch import Tensor


def tiny(tensor: Tensor) -> float:
    """Returns a substitute for zero in denominators: its reciprocal, and the square of that, are finite."""
    return float(torch.finfo(tensor.dtype).tiny ** 0.5)


def smallest(factor: Tensor) -> float:
    """Returns the smallest entry of multiplicative updates: one of exactly zero would stay zero, a denormal is slow."""
    return float(torch.finfo(factor.dtype).eps ** 2)
