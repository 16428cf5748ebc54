"""Weights that are computed from others, such as a product of factors: tensors that can only be read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from ..errors import LowRankError

_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_WRITES = {"__setitem__", "__set__", "__delete__", "register_hook", *(f"__i{name}__" for name in _ARITHMETIC)}


class ComputedWeight(Tensor):
    """A read-only tensor, for ``layer.weight`` where that is a product of factors or includes adapters.

    A write would change this copy and never the layer, so every write raises, also through ``.data``, ``.detach()`` and
    other views. Results computed from it are ordinary tensors.
    """

    _remedy: str
    _is_hf_initialized = True  # transformers draws no new values for it when it loads a model

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _written(func.__name__, args, kwargs)
        if written is not None:
            raise LowRankError(written._remedy)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        source = next((arg for arg in args if isinstance(arg, ComputedWeight)), None)
        return result if source is None else _views(result, source)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)


def computed(weight: Tensor, remedy: str) -> Tensor:
    """Returns the same values as a tensor that cannot be written to.

    Under compilers, exporters, vmap and other transformations the tensor is returned as it is.

    Args:
        weight: the computed weight.
        remedy: message of the error that a write raises.

    Examples:
        >>> from lowrank_layers.layers.computed_weight import computed
        >>> weight = computed(torch.ones(2, 2), "it is computed")
        >>> weight.sum()
        tensor(4.)
        >>> weight.data.zero_()
        Traceback (most recent call last):
        lowrank_layers.errors.LowRankError: it is computed
    """
    if type(weight) is not Tensor or torch.compiler.is_compiling() or torch._C._is_tracing():
        return weight
    if _functorch.maybe_current_level() is not None:
        return weight
    guarded = weight.as_subclass(ComputedWeight)
    guarded._remedy = remedy
    return guarded


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ComputedWeight | None:
    """Returns the computed weight that a call would write to, or ``None``."""
    out = kwargs.get("out")
    targets = list(out) if isinstance(out, (tuple, list)) else [out]
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
        first = args[0] if args else next(iter(kwargs.values()), None)
        targets += first if isinstance(first, (tuple, list)) else [first]
    return next((target for target in targets if isinstance(target, ComputedWeight)), None)


def _views(result: Any, source: ComputedWeight) -> Any:
    """Makes those tensors of a result that share memory with the computed weight read-only as well."""
    if isinstance(result, (tuple, list)):
        return type(result)(_views(each, source) for each in result) if type(result) in (tuple, list) else result
    if type(result) is not Tensor or result.is_meta or result.layout is not torch.strided:
        return result
    with torch._C.DisableTorchFunctionSubclass():
        shared = result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    if not shared:
        return result
    view = result.as_subclass(ComputedWeight)
    view._remedy = source._remedy
    return view
