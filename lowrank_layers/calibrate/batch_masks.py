"""Reading the mask of a batch: from a key or function of the user, from a model's arguments, or from labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import LowRankError
from .leave_out import LeaveOut

IGNORED = -100
"""The label that torch's cross-entropy ignores by default."""

MaskOf = str | Callable[[Any], Tensor] | LeaveOut
"""How the mask of a batch is found: a key of dict batches, a function from a batch to a mask ``[B, T]``, or the model's
own masks without some tokens."""


def find_mask(batch: Any, mask: str | Callable[[Any], Tensor]) -> Tensor:
    """Returns the mask of a batch, true at data, as the user said how to find it.

    Raises:
        LowRankError: if there is no such key, or what is found is no tensor ``[B, T]``.
    """
    if isinstance(mask, str):
        if not isinstance(batch, Mapping) or mask not in batch:
            keys = f"a dict of {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise LowRankError(f"mask={mask!r}: expected it among the keys of every batch, got {keys}.")
        found = batch[mask]
    else:
        found = mask(batch)
    if not isinstance(found, Tensor) or found.ndim < 2:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise LowRankError(f"mask: got {got} for a batch, expected a tensor [B, T], nonzero where a position is data.")
    return found.detach() != 0


def check_mask(mask: object, owner: str) -> None:
    """Raises for what is neither a key, nor a function, nor a :class:`LeaveOut`."""
    if mask is not None and not isinstance(mask, (str, LeaveOut)) and not callable(mask):
        raise LowRankError(
            f"{owner}: got mask of type {type(mask).__name__}, expected a key of the batches, a function from a"
            " batch to a tensor [B, T], nonzero where a position is data, or a LeaveOut."
        )


def read_mask(name: str, value: object) -> Tensor | None:
    """Returns the mask ``[B, T]``, true at data, that an argument of a module is; ``None`` if it is no such mask.

    The meaning follows from the name: ``*key_padding_mask`` is true, or minus infinity, at padding, as in torch;
    ``attention_mask`` is nonzero at data, as in transformers, or is added to scores, negative at padding.
    """
    if not isinstance(value, Tensor) or value.ndim != 2:
        return None
    value = value.detach()
    if name.endswith("key_padding_mask"):
        return value >= 0 if value.is_floating_point() else value == 0
    if value.is_floating_point():
        multiplied = bool(((value >= 0) & (value <= 1)).all() & (value > 0).any())
        return value != 0 if multiplied else value >= 0
    return value != 0


def labelled(labels: object) -> Tensor | None:
    """Returns the positions up to each sample's last label, for integer labels ``[B, T]`` some of which are -100."""
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    valid = labels != IGNORED
    if bool(valid.all()):
        return None
    return valid.flip(1).cumsum(1).flip(1) > 0
