"""Scaling a loss, so that gradients in fp16 neither overflow nor vanish."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PEAK = 2.0**8
"""The largest gradient in fp16, after scaling: far from 65,504 and from 6e-8."""
_TRIES = 6


def fitting_scale(largest: Callable[[float], float], dtype: torch.dtype) -> float:
    """Returns the power of two to multiply a loss by, so that gradients in fp16 neither overflow nor vanish.

    Args:
        largest: a function from a scale to the largest gradient that is found with it.
        dtype: dtype of the loss.
    """
    least, most = (2.0**-14, 2.0**15) if dtype == torch.float16 else (2.0**-60, 2.0**60)
    scale = 2.0**10
    for _ in range(_TRIES):
        peak = largest(scale)
        found = math.isfinite(peak) and peak > 0
        step = 2.0 ** math.floor(math.log2(_PEAK / peak)) if found else 2.0**-8 if peak else 2.0**8
        scale = min(max(scale * step, least), most)
        if found:
            break
    return scale


class LossScale:
    """Backward passes whose loss is scaled where some layer puts out fp16.

    A mean over 4,096 positions has gradients of 1e-4 and less for each of them, and fp16 rounds to 6e-8.

    Attributes:
        needed: whether a layer has put out fp16; layers set it.
        value: the scale of the backward pass that is running.
    """

    def __init__(self) -> None:
        self.needed = False
        self.value = 1.0
        self._peak: Tensor | None = None

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Runs the loss backwards, scaled so that the largest gradient of the layers is far from fp16's limits.

        Args:
            loss: the loss.
            retain_graph: whether the graph is needed again.
        """
        if self.needed:
            self.value = fitting_scale(lambda scale: self._largest(loss, scale), loss.dtype)
        torch.autograd.backward(loss, torch.full_like(loss, self.value), retain_graph=retain_graph)

    def is_measuring(self, gradient: Tensor) -> bool:
        """Whether this backward pass only finds the scale; then the gradient is looked at for its largest entry."""
        if self._peak is None:
            return False
        self._peak = torch.maximum(self._peak, gradient.abs().amax().float().to(self._peak.device))
        return True

    def _largest(self, loss: Tensor, scale: float) -> float:
        self._peak = loss.new_zeros((), dtype=torch.float32)
        torch.autograd.backward(loss, torch.full_like(loss, scale), retain_graph=True)
        peak, self._peak = float(self._peak), None
        return peak
