"""Memory of tensors whose values are in files, and of what was freed."""

from __future__ import annotations

import ctypes
import mmap
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

_MAPPED = "_lowrank_mapped"
"""The attribute of tensors whose values are those of a file."""
SPILLED = 1 << 20
"""Least bytes of a tensor for which a file of its own is worth its time."""
_PART = 1 << 22
"""Entries that are copied between memory and a file at once."""
_LIBC = ctypes.CDLL(None) if hasattr(mmap, "MADV_DONTNEED") else None
_MADVISE, _MALLOC_TRIM = getattr(_LIBC, "madvise", None), getattr(_LIBC, "malloc_trim", None)


def map_parameter(tensor: Tensor) -> nn.Parameter:
    """Returns a parameter without gradients of a tensor that ``read_tensor`` mapped; it must not be written to.

    Args:
        tensor: the tensor.
    """
    found = nn.Parameter(tensor, requires_grad=False)
    setattr(found, _MAPPED, True)
    return found


def spilled(tensor: Tensor, folder: Path) -> Tensor:
    """Returns a copy of a tensor, which is in a file as long as nobody looks at it where that saves memory.

    The file has no name, and ends with the copy.

    Args:
        tensor: the tensor.
        folder: where the file is.
    """
    if _MADVISE is None or tensor.device.type != "cpu" or tensor.nbytes < SPILLED or not tensor.is_contiguous():
        return tensor.clone()
    path = folder / f".{uuid.uuid4()}.tmp"
    try:
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=tensor.nbytes)
    finally:
        path.unlink(missing_ok=True)
    copy: Tensor = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)  # type: ignore[call-overload]
    setattr(copy, _MAPPED, True)
    _copy_in_parts_(copy, tensor, copy)
    return copy


def in_memory(tensor: Tensor) -> Tensor:
    """Returns a copy of what :func:`spilled` returned; less than both are in memory at any time.

    Args:
        tensor: the tensor, which is in its file again afterwards.
    """
    if not getattr(tensor, _MAPPED, False):
        return tensor.clone()
    copy = torch.empty_like(tensor)
    _copy_in_parts_(copy, tensor, tensor)
    return copy


def _copy_in_parts_(copy: Tensor, tensor: Tensor, mapped: Tensor) -> None:
    for own, part in zip(copy.view(-1).split(_PART), tensor.view(-1).split(_PART), strict=True):
        own.copy_(part)
        release_mapped([mapped])


def release_mapped(tensors: Iterable[Tensor]) -> None:
    """Lets go of the memory of tensors whose values are in a file; the next access reads them again.

    Others are passed over. On systems without ``madvise`` nothing happens: the system then frees mapped memory when it
    needs it.

    Args:
        tensors: what :func:`map_parameter` and :func:`spilled` returned; parameters that nobody has written to.
    """
    if _MADVISE is None:
        return
    for tensor in tensors:
        if getattr(tensor, _MAPPED, False) and not tensor.is_meta:
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def release_freed() -> None:
    """Gives the system back what was freed, and which C's allocator holds for later, in an arena for every thread.

    Only with glibc. What is allocated next takes a little longer, so this is for where a large part of the work ends.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)
