"""One sample out of a batch, and how it is moved and written to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def first_sample(batch: Any, samples: int) -> Any:
    """Returns a batch of the first sample alone, copied; what does not have one entry per sample stays as it is.

    Args:
        batch: a tensor, or a tuple, list or dict that holds some.
        samples: number of samples in the batch.
    """

    def first(tensor: Tensor) -> Tensor:
        return (tensor[:1] if tensor.ndim and len(tensor) == samples else tensor).detach().clone()

    return map_tensors(first, batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Returns a batch of other tensors.

    Args:
        function: what becomes of each tensor.
        batch: a tensor, or a tuple, list or dict that holds some.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(function, value) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def has_tokens(batch: Any, *, with_target: bool) -> bool:
    """Returns whether the inputs of a batch hold indices, such as those of words: integers of 32 or 64 bits.

    Args:
        batch: a batch in the form that :func:`calibrate` takes.
        with_target: whether the last item of a tuple batch is the target.
    """
    if isinstance(batch, Mapping):
        batch = {name: value for name, value in batch.items() if name != "labels"}
    elif with_target and isinstance(batch, (tuple, list)) and len(batch) > 1:
        batch = batch[:-1]
    found = []

    def look(tensor: Tensor) -> Tensor:
        found.append(tensor.dtype in (torch.int32, torch.int64))
        return tensor

    map_tensors(look, batch)
    return any(found)


def pack(batch: Any, tensors: list[Tensor]) -> Any:
    """Returns a batch as JSON can hold it, with the positions of its tensors in a list.

    Args:
        batch: a batch of tensors, numbers and text.
        tensors: the list, to which they are added.

    Raises:
        TypeError: for anything else in it.
    """
    if isinstance(batch, Tensor):
        tensors.append(batch)
        return {"tensor": len(tensors) - 1}
    if type(batch) is dict and all(isinstance(name, str) for name in batch):
        return {"dict": {name: pack(value, tensors) for name, value in batch.items()}}
    if type(batch) in (tuple, list):
        return {type(batch).__name__: [pack(value, tensors) for value in batch]}
    if batch is None or type(batch) in (bool, int, float, str):
        return batch
    raise TypeError(f"a {type(batch).__name__}")


def unpack(packed: Any, tensors: Mapping[int, Tensor]) -> Any:
    """Returns the batch that :func:`pack` took apart.

    Args:
        packed: what JSON held.
        tensors: the tensors by their positions.
    """
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {name: unpack(each, tensors) for name, each in value.items()}
    return {"tuple": tuple, "list": list}[kind](unpack(each, tensors) for each in value)
