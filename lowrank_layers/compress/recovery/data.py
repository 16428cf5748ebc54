"""Batches in an order that a seed decides, from any position on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ...errors import LowRankError

Position = tuple[int, int]
"""Epoch, and number of batches of it that are done."""
_END = object()


def seeded_batches(data: Iterable[Any], seed: int, rank: int, position: Position) -> Iterator[tuple[Position, Any]]:
    """Yields the batches of epoch after epoch, each with the position behind it, without end.

    Torch's global generator is seeded at the start of every epoch and before every batch, the data's own generator at
    the start of every epoch, and a distributed sampler is told the epoch. So what data and model draw between two
    batches depends on seed, process and position only.

    Args:
        data: what can be iterated over again and again.
        seed: the seed.
        rank: number of the process.
        position: where to begin; the batches of the epoch before it are read and dropped.
    """
    epoch, done = position
    while True:
        samplers = [getattr(data, name, None) for name in ("sampler", "batch_sampler")]
        samplers.append(getattr(samplers[1], "sampler", None))
        for each in (data, *samplers):
            if callable(set_epoch := getattr(each, "set_epoch", None)):
                set_epoch(epoch)
            if isinstance(generator := getattr(each, "generator", None), torch.Generator):
                generator.manual_seed(_derived(seed, rank, epoch, 0))
        torch.manual_seed(_derived(seed, rank, epoch, 0))
        iterator, index = iter(data), 0
        while True:
            torch.manual_seed(_derived(seed, rank, epoch, index + 1))
            if (batch := next(iterator, _END)) is _END:
                break
            index += 1
            if index > done:
                yield (epoch, index), batch
        if not index:
            raise LowRankError("recover_: data has no batches, expected at least one in every pass over it.")
        epoch, done = epoch + 1, 0


def check_data(data: object, name: str) -> None:
    """Raises for what can be iterated over only once, such as a generator."""
    if isinstance(data, Iterator):
        raise LowRankError(
            f"recover_: got {name} of type {type(data).__name__}, which can be read only once; expected a list of"
            f" batches or a DataLoader, as in {name}=list(batches)."
        )


def _derived(*numbers: int) -> int:
    """A seed of 63 bits that differs for different numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1
