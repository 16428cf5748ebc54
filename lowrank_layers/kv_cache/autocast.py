"""Autocast as ``F.scaled_dot_product_attention`` honours it: inputs are cast, what happens inside is not."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """Casts a tensor as autocast casts the inputs of torch's own functions; without autocast it stays as it is.

    Args:
        x: the tensor; fp64 stays as well.
    """
    if not _is_on(x.device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, in which moments, bases and coefficients are computed in fp32.

    Args:
        device: the device for which autocast may be on.
    """
    return torch.autocast(device.type, enabled=False) if _is_on(device) else contextlib.nullcontext()


def _is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
