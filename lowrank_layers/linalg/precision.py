"""Arithmetic in the precision of its operands inside regions of ``torch.autocast``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function to compute the same inside a region of ``torch.autocast`` as outside.

    Autocast would compute the matrix products of a decomposition in half precision.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not devices:
            return function(*args, **kwargs)
        with torch.autocast(devices[0], enabled=False), torch.autocast(devices[-1], enabled=False):
            return function(*args, **kwargs)

    return wrapped
