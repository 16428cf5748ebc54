"""Initialization of factored layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .base import FactoredModule
from .weights import bias_of, weight_of


@torch.no_grad()
def reset_chain(layer: FactoredModule, fan_in: int) -> None:
    """Draws new weights such that outputs have the variance that those of a new dense layer have.

    torch.nn draws a dense weight from ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, whose variance is ``1/(3 fan_in)``. Here
    every child but the last preserves the variance of its input, and the last one is scaled such that an entry of the
    product, a sum over all inner indices, has that variance.

    Args:
        layer: the factored layer.
        fan_in: number of inputs per output of the dense layer.
    """
    inner = math.prod(layer.rank) if isinstance(layer.rank, tuple) else layer.rank
    left = 1 / (3 * max(1, fan_in) * inner)
    *others, last = layer.parts
    for child in others:
        fan = max(1, _fan_in(child))
        nn.init.uniform_(weight_of(child), -math.sqrt(3 / fan), math.sqrt(3 / fan))
        left *= fan
    nn.init.uniform_(weight_of(last), -math.sqrt(3 * left), math.sqrt(3 * left))
    bias = bias_of(last)
    if bias is not None:
        nn.init.uniform_(bias, -1 / math.sqrt(max(1, fan_in)), 1 / math.sqrt(max(1, fan_in)))


@contextmanager
def allowing_empty() -> Iterator[None]:
    """Keeps torch from warning of children without weights, such as the coefficients of a pivot form at full rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield


def _fan_in(child: nn.Module) -> int:
    """Number of inputs per output, counting all positions of a kernel."""
    weight = weight_of(child)
    if getattr(child, "transposed", False):
        return weight.numel() // weight.shape[1] // getattr(child, "groups", 1)
    return weight[0].numel()
