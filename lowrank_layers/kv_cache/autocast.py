"""Autocast as ``F.scaled_dot_product_attention`` takes it: inputs in half precision, everything within as it is."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """In the dtype of the autocast that is on, if one is: what a torch function on its list does to its inputs."""
    if not _is_on(x.device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """In which products of fp32 tensors are products in fp32: moments, bases and coefficients need them."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else contextlib.nullcontext()


def _is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
