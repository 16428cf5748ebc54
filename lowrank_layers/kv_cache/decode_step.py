"""One step of attention to a whole cache on a CPU, in one compiled function.

What it serves is the common step of generation: one query per head and no mask. The same in operations of torch, which
serves everywhere else, is in ``attend.py``.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import decode_kernel
from .bit_coefficients import LEAST_GAIN
from .bit_planes import PLANES
from .compiled_functions import compiled_functions
from .compressed_tokens import CompressedTokens
from .decode_kernel import Arguments, arguments
from .recent_tokens import RecentTokens
from .rope import TILE_FRAME, Rotation

Sides = tuple[Tensor, Tensor]
RECENT = 2 * (len(PLANES) + 1) + 5
"""Where, among the numbers, that of recent tokens is."""
THREADS = RECENT + 19
"""Where the number of threads is."""


def attention(
    query: Tensor,
    first: Sides | None,
    recent: tuple[RecentTokens, RecentTokens] | None,
    old: tuple[CompressedTokens, CompressedTokens] | None,
    rotation: Rotation | None,
    scale: float | None,
) -> Tensor | None:
    """Softmax attention of one query per head to exact and to compressed tokens.

    Args:
        query: ``[batch, query heads, 1, size]``.
        first: exact keys and values ``[batch, heads, tokens, size]`` before the compressed ones; ``None`` for none.
        recent: exact keys and values after them; ``None`` for none.
        old: compressed keys, in the frame of their tile, and values; ``None`` for none.
        rotation: the rotation of the keys; ``None`` for none.
        scale: factor of the scores; ``None`` is ``size^(-1/2)``.

    Returns:
        ``[batch, query heads, 1, size of a value]``; ``None`` where the compiled function does not serve.
    """
    if old is None or recent is None or rotation is None or not _serves(query):
        return None
    step = _prepared(query, first, recent, old, rotation)
    if step is None:
        return None
    query, numbers = query.contiguous(), step.numbers
    out = query.new_empty(step.shape)
    numbers[RECENT], numbers[THREADS] = recent[0].tokens, torch.get_num_threads()
    step.function(query.data_ptr(), out.data_ptr(), step.tensors, numbers, step.scale if scale is None else scale)
    return out


@dataclass(frozen=True, eq=False)
class _Step:
    """What of a step's arguments stays until more tokens are compressed."""

    parts: tuple[object, ...]
    sides: tuple[Arguments, Arguments]
    query: torch.Size
    scale: float
    shape: tuple[int, ...]
    waves: Tensor
    function: Callable[..., None]
    tensors: ctypes.Array[ctypes.c_void_p]
    numbers: ctypes.Array[ctypes.c_int64]


def _prepared(
    query: Tensor,
    first: Sides | None,
    recent: tuple[RecentTokens, RecentTokens],
    old: tuple[CompressedTokens, CompressedTokens],
    rotation: Rotation,
) -> _Step | None:
    """The arguments that stay; ``None`` where the compiled function does not serve."""
    keys, values = old[0].parts[0], old[1].parts[0]
    buffers = recent[0].buffer, recent[1].buffer
    parts = (keys.subspace, keys.coefficients.codes, values.subspace, values.coefficients.codes, first, *buffers)
    held: _Step | None = vars(keys.coefficients).get("_step")
    if held is not None and held.query == query.shape and all(map(operator.is_, held.parts, parts)):
        return held
    if query.shape[2] != 1 or len(old[0].parts) != 1 or len(old[1].parts) != 1 or old[0].frame is None:
        return None
    groups, heads = keys.subspace.basis.shape[1], old[0].heads
    exact = ((None, None) if first is None else first, buffers)
    served = all(decode_kernel.applies(query, part.subspace, part.coefficients) for part in (keys, values))
    if not served or groups != values.subspace.basis.shape[1] or not all(_is_plain(x) for run in exact for x in run):
        return None
    batch, query_heads, _, size = query.shape
    sides = (arguments(keys.subspace, keys.coefficients), arguments(values.subspace, values.coefficients))
    waves = rotation.tile_waves(0 if first is None else first[0].shape[2], old[0].tokens)
    numbers = (
        *(count for side in sides for count in side.counts),
        *(number for run in exact for number in _sizes(*run)),
        *(side.pitch for side in sides),
        batch,
        groups,
        len(keys.subspace.mean),
        len(values.subspace.mean),
        heads // groups,
        query_heads // heads,
        size,
        values.size,
        len(rotation.frequencies),
        old[0].tokens,
        TILE_FRAME,
        LEAST_GAIN,
        torch.get_num_threads(),
    )
    frame = (old[0].frame.entries.data_ptr(), waves.data_ptr(), rotation.offset_waves.data_ptr())
    tokens = (0 if x is None else x.data_ptr() for run in exact for x in run)
    pointers = (*frame, *sides[0].pointers, *sides[1].pointers, *tokens)
    functions = compiled_functions()
    assert functions is not None
    step = _Step(
        parts,
        sides,
        query.shape,
        size**-0.5,
        (batch, query_heads, 1, values.size),
        waves,
        functions.attention,
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(numbers))(*numbers),
    )
    vars(keys.coefficients)["_step"] = step
    return step


def _serves(query: Tensor) -> bool:
    """Whether a query is fp32 on a CPU, without a gradient or autocast."""
    if torch.compiler.is_compiling() or type(query) is not Tensor:
        return False
    learns = query.requires_grad and torch.is_grad_enabled()
    return query.is_cpu and query.dtype is torch.float32 and not learns and not torch.is_autocast_enabled("cpu")


def _is_plain(x: Tensor | None) -> bool:
    """Whether exact tokens can be read: fp32, a token after the other within a head."""
    return x is None or (x.dtype == torch.float32 and (x.stride(3), x.stride(2)) == (1, x.shape[3]))


def _sizes(keys: Tensor | None, values: Tensor | None) -> tuple[int, ...]:
    """How many exact tokens there are, and the steps between batch rows and heads, of keys and of values."""
    if keys is None or values is None:
        return (0,) * 5
    return keys.shape[2], *keys.stride()[:2], *values.stride()[:2]
