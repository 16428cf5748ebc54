"""Giving a module another forward for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def overridden(module: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Gives one module another ``forward`` inside, or that of its class.

    Args:
        module: the module.
        forward: the other one; ``None`` is that of its class.
    """
    own = vars(module)
    before = own.pop("forward", None)
    if forward is not None:
        own["forward"] = forward
    try:
        yield
    finally:
        own.pop("forward", None)
        if before is not None:
            own["forward"] = before
