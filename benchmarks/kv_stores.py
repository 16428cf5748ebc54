"""Key/value caches of one layer that benchmarks compare: exact, evicted, quantized and low-rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

import lowrank_layers as lr

DTYPE = torch.bfloat16
"""Dtype of exact keys and values; the arithmetic is in fp32."""


class Store(Protocol):
    """The cache of one layer."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends tokens and returns all keys and values for the attention."""

    def nbytes(self) -> int:
        """Bytes of everything that is stored for a sequence."""

    def shared_nbytes(self) -> int:
        """Bytes of what calibration gave to the model, which all sequences share."""
        return 0


class Exact(Store):
    """Keeps everything."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept is not None:
            keys, values = torch.cat([self.kept[0], keys], 2), torch.cat([self.kept[1], values], 2)
        self.kept = keys, values
        return self.kept

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.kept or ())


class Evicting(Exact):
    """Eviction: keeps the first tokens and a window of the last ones; keys keep the rotation of their position."""

    def __init__(self, recent: int, first: int = 4) -> None:
        super().__init__()
        self.recent, self.first = recent, first

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = super().update(keys, values)
        if seen[0].shape[2] > self.first + self.recent:
            keys, values = (torch.cat([t[:, :, : self.first], t[:, :, -self.recent :]], 2) for t in seen)
            self.kept = keys, values
        return seen


class FourBits(Store):
    """Stores all but the recent tokens in 4 bits, with an fp16 scale and zero point per token and head."""

    def __init__(self, recent: int) -> None:
        self.recent, self.tail = recent, Exact()
        self.codes: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        tail = self.tail.update(keys, values)
        old = [[self.decoded(*c) for c in self.codes[side::2]] for side in (0, 1)]
        seen = torch.cat([*old[0], tail[0]], 2), torch.cat([*old[1], tail[1]], 2)
        left = tail[0].shape[2] - self.recent
        if left > 0:
            self.codes += [self.coded(t[:, :, :left]) for t in tail]
            keys, values = (t[:, :, left:] for t in tail)
            self.tail.kept = keys, values
        return seen

    @staticmethod
    def coded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = (f(x.float(), dim=-1, keepdim=True).half() for f in (torch.amin, torch.amax))
        scale = ((high.float() - low.float()) / 15).clamp_min(1e-6).half()
        codes = ((x.float() - low.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        return codes[..., 0::2] * 16 + codes[..., 1::2], scale, low

    @staticmethod
    def decoded(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        wide = torch.stack([codes // 16, codes % 16], -1).flatten(-2)
        return (wide * scale.float() + low.float()).to(DTYPE)

    def nbytes(self) -> int:
        return self.tail.nbytes() + sum(t.nbytes for each in self.codes for t in each)


class Quantized(Store):
    """Wraps a layer of transformers' ``QuantizedCache``."""

    def __init__(self, config: Any, backend: str, **options: Any) -> None:
        from transformers.cache_utils import QuantizedCache

        self.layer = QuantizedCache(backend, config, **options).layers[0]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layer.update(keys, values)
        return keys, values

    def nbytes(self) -> int:
        return sum(tensor_bytes(value) for value in vars(self.layer).values())


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in an attribute; a quantized tensor wraps plain ones."""
    if isinstance(value, (tuple, list)):
        return sum(map(tensor_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


class LowRank(Store):
    """The low-rank cache; keys and values are rebuilt, which gives the same as :meth:`LowRankKV.attend`."""

    def __init__(self, settings: lr.KVSettings, rotation: lr.Rotation, subspaces: Any = None) -> None:
        self.cache, self.rebuilt = lr.LowRankKV(settings, rotation, subspaces), Exact()

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen, before = self.append(keys, values), self.cache.compressed
        self.cache.compress()
        if self.cache.compressed != before:
            self.rebuilt.kept = self.cache.dense()
        return seen

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends tokens, and compresses none."""
        self.cache.append(keys, values)
        return self.rebuilt.update(keys, values)

    def nbytes(self) -> int:
        return self.cache.nbytes()

    def shared_nbytes(self) -> int:
        return self.cache.shared_nbytes()


Make = Callable[[int], Store]
"""Makes the cache of the layer with this index."""
