"""One step of attention to a whole cache on a CPU, in one compiled function.

What it serves is the common step of generation: one query per head and no mask. The same in operations of torch, which
serves everywhere else, is in ``attend.py``.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import decode_kernel
from .bit_coefficients import LEAST_GAIN
from .bit_planes import PLANES
from .compiled_functions import compiled_functions
from .compressed_tokens import CompressedTokens
from .decode_kernel import Arguments, arguments
from .rope import TILE_FRAME, Rotation

Sides = tuple[Tensor, Tensor]
EXACT = 3 + 2 * (4 + len(PLANES))
"""Where the pointers to exact tokens begin."""
SIZES = 2 * (len(PLANES) + 1)
"""Where the sizes of exact tokens begin."""
THREADS = SIZES + 10 + 14
"""Where the number of threads is."""


def attention(
    query: Tensor,
    exact: Sequence[Sides],
    old: tuple[CompressedTokens, CompressedTokens],
    rotation: Rotation,
    offset: int,
    scale: float,
) -> Tensor | None:
    """Softmax attention of one query per head to exact and to compressed tokens.

    Args:
        query: ``[batch, query heads, 1, size]``.
        exact: keys and values ``[batch, heads, tokens, size]`` of at most two runs of exact tokens.
        old: compressed keys, in the frame of their tile, and values.
        rotation: the rotation of the keys.
        offset: index of the first compressed token.
        scale: factor of the scores.

    Returns:
        ``[batch, query heads, 1, size of a value]``; ``None`` where the compiled function does not serve.
    """
    if not (_serves(query) and len(exact) <= 2 and all(_is_plain(side) for pair in exact for side in pair)):
        return None
    step = _prepared(query, old, rotation, offset)
    if step is None:
        return None
    query = query.contiguous()
    out = query.new_empty(*query.shape[:3], step.value_size)
    for index in range(2):
        sizes: list[int | ctypes.c_int64] = [0] * 5
        if index < len(exact):
            k, v = exact[index]
            step.tensors[EXACT + 2 * index : EXACT + 2 * index + 2] = [k.data_ptr(), v.data_ptr()]
            sizes = [k.shape[2], *k.stride()[:2], *v.stride()[:2]]
        step.numbers[SIZES + 5 * index : SIZES + 5 * index + 5] = sizes
    step.numbers[THREADS] = torch.get_num_threads()
    step.function(query.data_ptr(), out.data_ptr(), step.tensors, step.numbers, scale)
    return out


@dataclass(frozen=True, eq=False)
class _Step:
    """What of a step's arguments stays until more tokens are compressed."""

    stored: tuple[object, ...]
    sides: tuple[Arguments, Arguments]
    shape: torch.Size
    waves: Tensor
    function: Callable[..., None]
    tensors: ctypes.Array[ctypes.c_void_p]
    numbers: ctypes.Array[ctypes.c_int64]
    value_size: int


def _prepared(
    query: Tensor, old: tuple[CompressedTokens, CompressedTokens], rotation: Rotation, offset: int
) -> _Step | None:
    """The arguments for compressed tokens; ``None`` where the compiled function does not serve."""
    keys, values = old
    first, second = keys.parts[0], values.parts[0]
    stored = (first.subspace, first.coefficients.codes, second.subspace, second.coefficients.codes)
    held: _Step | None = vars(first.coefficients).get("_step")
    if held is not None and held.shape == query.shape and all(map(operator.is_, held.stored, stored)):
        return held
    if len(keys.parts) != 1 or len(values.parts) != 1 or keys.frame is None:
        return None
    groups, heads = first.subspace.basis.shape[1], keys.heads
    served = all(decode_kernel.applies(query, part.subspace, part.coefficients) for part in (first, second))
    if not served or groups != second.subspace.basis.shape[1]:
        return None
    batch, query_heads, _, size = query.shape
    sides = (arguments(first.subspace, first.coefficients), arguments(second.subspace, second.coefficients))
    waves = rotation.tile_waves(offset, keys.tokens)
    numbers = (
        *(count for side in sides for count in side.counts),
        *[0] * 10,
        *(side.pitch for side in sides),
        batch,
        groups,
        len(first.subspace.mean),
        len(second.subspace.mean),
        heads // groups,
        query_heads // heads,
        size,
        second.size,
        len(rotation.frequencies),
        keys.tokens,
        TILE_FRAME,
        LEAST_GAIN,
        0,
    )
    tensors = (keys.frame.entries.data_ptr(), waves.data_ptr(), rotation.offset_waves.data_ptr())
    pointers = (*tensors, *sides[0].pointers, *sides[1].pointers, *[0] * 4)
    functions = compiled_functions()
    assert functions is not None
    step = _Step(
        stored,
        sides,
        query.shape,
        waves,
        functions.attention,
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(numbers))(*numbers),
        second.size,
    )
    vars(first.coefficients)["_step"] = step
    return step


def _serves(query: Tensor) -> bool:
    """Whether a query is fp32 on a CPU, without a gradient."""
    learns = query.requires_grad and torch.is_grad_enabled()
    plain = type(query) is Tensor and query.device.type == "cpu" and query.dtype == torch.float32
    return plain and not learns and not torch.compiler.is_compiling()


def _is_plain(x: Tensor) -> bool:
    """Whether exact tokens can be read: fp32, a token after the other within a head."""
    return x.dtype == torch.float32 and (x.stride(3), x.stride(2)) == (1, x.shape[3])
