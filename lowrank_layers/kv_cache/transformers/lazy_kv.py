"""What a cache returns in place of keys and values where the attention can read coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..low_rank_kv import LowRankKV


class Handle:
    """Stands for the keys and the values of a layer at one step.

    Args:
        kv: the cache of the layer.
    """

    def __init__(self, kv: LowRankKV) -> None:
        self.kv = kv
        self._dense: dict[int, Tensor] = {}

    @property
    def shape(self) -> torch.Size:
        """Shape of the keys."""
        return self.shape_of(0)

    def shape_of(self, side: int) -> torch.Size:
        """Shape of keys or values.

        Args:
            side: 0 for keys, 1 for values.
        """
        batch, heads, _, size = self.kv.like(side).shape
        return torch.Size((batch, heads, len(self.kv), size))

    def dense(self, side: int) -> Tensor:
        """Keys or values as one tensor, rebuilt once.

        Args:
            side: 0 for keys, 1 for values.
        """
        if side not in self._dense:
            self._dense[side] = self.kv.side(side)
        return self._dense[side]


class LazyKV(torch.Tensor):
    """A handle that looks like a tensor, and is rebuilt into one where a model itself computes with it.

    It cannot be made under torch.compile; the attention gets the handle itself then.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    handle: Handle
    side: int

    @staticmethod
    def both(kv: LowRankKV) -> tuple[LazyKV, LazyKV]:
        """Tensors that stand for keys and values.

        Args:
            kv: the cache of a layer.
        """
        key, value, tokens, make = kv.like(0), kv.like(1), len(kv), torch.Tensor._make_wrapper_subclass
        batch, heads, _, size = key.shape
        keys: LazyKV = make(LazyKV, (batch, heads, tokens, size), dtype=key.dtype, device=key.device)
        values: LazyKV = make(LazyKV, (batch, heads, tokens, value.shape[3]), dtype=value.dtype, device=value.device)
        keys.handle = values.handle = Handle(kv)
        keys.side, values.side = 0, 1
        return keys, values

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyKV(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs any operation on what is rebuilt."""
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def cache_behind(keys: object, values: object) -> LowRankKV | None:
    """The cache whose keys and values these are; ``None`` if they are plain tensors.

    Args:
        keys: what an attention got as its keys.
        values: what it got as its values.
    """
    if isinstance(keys, Handle):
        return keys.kv
    if isinstance(keys, LazyKV) and isinstance(values, LazyKV) and keys.handle.kv is values.handle.kv:
        return keys.handle.kv if len(keys.handle.kv) == keys.shape[2] else None
    return None


def _plain(x: Any) -> Any:
    return x.handle.dense(x.side) if isinstance(x, LazyKV) else x
