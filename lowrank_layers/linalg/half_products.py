"""Matrix products of half-precision tensors, computed in fp32 on processors that have no instructions for them."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HALVES = (torch.bfloat16, torch.float16)
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}
_ATTENTIONS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 1,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
}
"""How many of their results, the first ones, have the dtype of the operands."""
_thread = threading.local()


def halves_are_slow() -> bool:
    """Returns whether this processor computes products of half-precision matrices entry by entry.

    On x86 without AVX512 a gradient of a linear layer in bfloat16 takes two hundred times as long as in fp32.
    """
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


@contextmanager
def half_products_in_fp32(enabled: bool) -> Iterator[None]:
    """Computes matrix products and attention of half-precision tensors on the CPU in fp32 inside, and rounds them once.

    The results are those of sums in fp32, which is how processors with instructions for them compute. Operands are
    widened one product at a time.

    Args:
        enabled: whether to do so.
    """
    before = in_fp32()
    _thread.active = before or enabled
    try:
        if enabled and not before:
            with _InSinglePrecision():  # type: ignore[no-untyped-call]
                yield
        else:
            yield
    finally:
        _thread.active = before


def in_fp32() -> bool:
    """Returns whether :func:`half_products_in_fp32` is at work in this thread."""
    return getattr(_thread, "active", False)


class _InSinglePrecision(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # for which torch would import its compiler, which takes a second and 75 MB

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first, count, kwargs = args[0] if args else None, _ATTENTIONS.get(func, 0), kwargs or {}
        if not isinstance(first, Tensor) or first.dtype not in _HALVES or not first.is_cpu:
            return func(*args, **kwargs)
        if func not in _PRODUCTS and not count:
            return func(*args, **kwargs)
        found = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        if not count:
            return found.to(first.dtype)
        return *(each.to(first.dtype) for each in found[:count]), *found[count:]


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value
