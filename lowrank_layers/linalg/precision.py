"""Arithmetic in the precision of its operands, whatever autocast says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """A function that computes inside a region of ``torch.autocast`` what it computes outside.

    Autocast is for the products of a forward pass. It would form those of a decomposition in half precision too.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not devices:
            return function(*args, **kwargs)
        with torch.autocast(devices[0], enabled=False), torch.autocast(devices[-1], enabled=False):
            return function(*args, **kwargs)

    return wrapped
