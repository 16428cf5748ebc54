"""Dropout on the input of adapters, drawn once for all layers that read the same tensor."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Last(threading.local):
    """What was dropped out from last, and who has read it."""

    source: weakref.ref[Tensor] | None = None
    key: tuple[Any, ...] = ()
    dropped: Tensor | None = None
    readers: set[int]

    def forget(self, source: weakref.ref[Tensor]) -> None:
        if source is self.source:
            self.source, self.dropped = None, None


_last = _Last()


def shared_dropout(input: Tensor, chance: float, reader: object) -> Tensor:
    """``dropout(input)``; layers that read one tensor after another (q, k, v) share one draw.

    So one copy of the input is kept for the backward pass, not one a layer, and its mask takes a byte an entry. A layer
    that reads the same tensor again gets a new draw, and so does one under another checkpoint: what is computed again
    must be what was computed. (A reentrant checkpoint cannot be seen: put it around all that share, or none.)

    Args:
        input: any tensor.
        chance: of an entry to be dropped.
        reader: who asks; each is given a draw once.
    """
    if torch.compiler.is_compiling() or input.is_inference():
        return F.dropout(input, chance)
    # the hooks tell checkpoints apart: every one packs what it saves in its own way
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    key = (chance, input._version, torch.is_grad_enabled(), hooks)
    dropped = _last.dropped
    known = _last.source is not None and _last.source() is input and _last.key == key
    if dropped is None or not known or id(reader) in _last.readers:
        dropped, _ = torch.native_dropout(input, chance, True)
        _last.source, _last.dropped = weakref.ref(input, _last.forget), dropped
        _last.key, _last.readers = key, set()
    _last.readers.add(id(reader))
    return dropped
