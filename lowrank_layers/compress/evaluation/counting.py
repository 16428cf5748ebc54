"""Multiply-accumulates and memory of a forward pass, counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...modules import shared_names


def count_macs(call: Callable[[], object]) -> int:
    """Counts the multiply-accumulates of a call, as half of what torch's ``FlopCounterMode`` reports.

    Products of matrices, convolutions and attention count; recurrent layers and custom kernels do not.

    Args:
        call: runs a model.
    """
    from torch.utils.flop_counter import FlopCounterMode

    own = {torch.ops.aten._weight_int8pack_mm: _int8_flops}
    with _spelled_out(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def _int8_flops(rows: tuple[int, ...], codes: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Operations of torch's int8 kernel, which its counter does not know, by the shapes of its arguments."""
    return 2 * rows[0] * codes[0] * codes[1]


def peak_memory(model: nn.Module, call: Callable[[], object]) -> int:
    """Returns the greatest number of bytes that parameters, buffers and tensors of a call take at one moment.

    What a kernel takes for itself does not count, so that the number is the same on every device.

    Args:
        model: the model that is run.
        call: runs it.
    """
    alive = _Alive([*model.parameters(), *model.buffers()])
    with alive:
        call()
    return alive.peak


def stored_bytes(model: nn.Module) -> int:
    """Returns the bytes of the tensors in the state dict, shared ones once: those in a safetensors file of the model.

    Args:
        model: the model.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    shared = shared_names(tensors)
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name not in shared)


class _Alive(TorchDispatchMode):
    """Adds up the storages that are alive: those of given tensors, and those that operations make."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = {tensor.untyped_storage() for tensor in tensors}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(storages)
        self._now: int = sum(storage.nbytes() for storage in storages)
        self.peak = self._now

    def _add(self, tensor: Tensor) -> None:
        """Counts the tensor's storage until it is freed, if it is not counted yet."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self._now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._add(leaf)
        return result


@contextmanager
def _spelled_out() -> Iterator[None]:
    """Computes attentions and encoder layers by operations that the counter knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
