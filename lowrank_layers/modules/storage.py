"""Tensors of a state dict that share memory: one under several names, parts of one storage, overlapping views."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..errors import CheckpointError


def shared_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Returns the first name of every tensor that has an earlier name.

    Examples:
        >>> from lowrank_layers.modules.storage import shared_names
        >>> weight = torch.ones(3, 2)
        >>> shared_names({"embed": weight, "other": torch.ones(3, 2), "head": weight})
        {'head': 'embed'}
    """
    names: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if tensor.numel():
            names[_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype].append(name)
    return {other: first for first, *others in names.values() for other in others}


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors, each contiguous and in memory of its own, as safetensors needs them.

    Parts of one storage that have no element in common (the halves of one tensor) are copied.

    Raises:
        CheckpointError: if two of them have elements in common, which would be written twice and come back apart.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            groups[_storage(tensor)].append(name)
    copied: set[str] = set()
    for names in groups.values():
        for k, name in enumerate(names):
            other = next((n for n in names[:k] if _overlap(tensors[n], tensors[name])), None)
            if other is not None:
                raise CheckpointError(
                    f"save: {name!r} and {other!r} are different views of the same memory, which a file cannot keep:"
                    " they would come back as two separate tensors; give one of them its own memory with .clone()."
                )
        copied |= set(names[1:])
    return {
        n: t.clone(memory_format=torch.contiguous_format) if n in copied else t.contiguous() for n, t in tensors.items()
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    (first, last), (other_first, other_last) = _span(a), _span(b)
    if last < other_first or other_last < first:
        return False
    if a.element_size() != b.element_size():
        return True
    start, size = min(first, other_first) // a.element_size(), max(last, other_last) // a.element_size()
    taken = torch.zeros(size - start + 1, dtype=torch.bool)
    taken.as_strided(a.shape, a.stride(), a.storage_offset() - start).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset() - start).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Returns at which bytes of the storage the first and the last element begin."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset()) * tensor.element_size()
    return first, first + int(reach) * tensor.element_size()
