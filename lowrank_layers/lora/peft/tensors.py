"""How the tensors of an adapter lie in PEFT's files."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapted_weight import AdaptedWeight
from ..adapter import Adapter
from ..mixed_groups import MixedGroups
from ..weight_layout import Kernel, WeightLayout


def file_shapes(weight: AdaptedWeight, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of ``a``, ``b``, ``magnitude`` and ``bias`` in the file, for an adapter of that rank."""
    layout, base = weight.layout, weight.base
    if isinstance(layout, Kernel):
        ones = (1,) * (base.ndim - 2)
        a: tuple[int, ...] = (rank, base.shape[1] * layout.groups, *base.shape[2:])
        b: tuple[int, ...] = (base.shape[0], rank // layout.groups, *ones)
        return {"a": a, "b": b, "magnitude": (1, base.shape[0], *ones), "bias": (base.shape[0],)}
    *stack, out, into = layout.matrix(base).shape
    if _is_transposed_stack(weight):
        out, into = into, out
    rows = rank * (stack[0] if stack else 1)
    return {"a": (rows, into), "b": (out, rows), "magnitude": (out,), "bias": (out,)}


def decode(weight: AdaptedWeight, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """``A`` and ``B`` in our layout; ``None`` where ``A`` reads the channels of all groups of a convolution."""
    groups = groups_of(weight.layout)
    if groups > 1:
        width = weight.base.shape[1]
        blocks = a.unflatten(0, (groups, -1)).unflatten(2, (groups, width))
        own = torch.stack([blocks[j, :, j] for j in range(groups)])
        return (own.flatten(0, 1), b) if int(own.count_nonzero()) == int(a.count_nonzero()) else None
    if weight.base.ndim == 3 and not isinstance(weight.layout, Kernel):
        count = weight.base.shape[0]
        a, b = a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1)
        return (b.mT, a.mT) if _is_transposed_stack(weight) else (a, b)
    return a, b


def encode(weight: AdaptedWeight, adapter: Adapter) -> tuple[Tensor, Tensor, int]:
    """``A`` and ``B`` as they lie in the file, and the rank there."""
    if isinstance(adapter, MixedGroups):
        return adapter.A.detach(), adapter.B.detach(), adapter.A.shape[0]
    a, b = _with_start(adapter, weight.layout)
    groups = groups_of(weight.layout)
    if groups > 1:
        width, parts = a.shape[1], a.unflatten(0, (groups, -1))
        wide = a.new_zeros(groups, parts.shape[1], groups * width, *a.shape[2:])
        for j in range(groups):
            wide[j, :, j * width : (j + 1) * width] = parts[j]
        a = wide.flatten(0, 1)
    elif a.ndim == 3 and not isinstance(weight.layout, Kernel):
        a, b = (b.mT, a.mT) if _is_transposed_stack(weight) else (a, b)
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1), a.shape[1]
    return a, b, a.shape[0]


def groups_of(layout: WeightLayout) -> int:
    """The number of groups of a convolution; one for any other layer."""
    return layout.groups if isinstance(layout, Kernel) else 1


def _is_transposed_stack(weight: AdaptedWeight) -> bool:
    """Whether a stack of matrices holds ``[in, out]``, where PEFT's ``A`` meets the input."""
    return weight.base.ndim == 3 and bool(getattr(weight.module, "is_transposed", False))


def _with_start(adapter: Adapter, layout: WeightLayout) -> tuple[Tensor, Tensor]:
    """``[A; A0]`` and ``[B, -B0]``, so that the file fits the unmodified base."""
    a, b = adapter.A.detach(), adapter.B.detach()
    if adapter.a0 is None or adapter.b0 is None:
        return a, b
    if isinstance(layout, Kernel):
        parts = [t.unflatten(0, (layout.groups, -1)) for t in (a, adapter.a0)]
        return torch.cat(parts, 1).flatten(0, 1), torch.cat([b, -adapter.b0], 1)
    return torch.cat([a, adapter.a0], -2), torch.cat([b, -adapter.b0], -1)
