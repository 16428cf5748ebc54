"""One step of attention to a whole cache on a CPU, in one compiled function.

What it serves is the common step of generation: one query per head and no mask. The same in operations of torch, which
serves everywhere else, is in ``attend.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import decode_kernel
from .bit_allocation import WIDTHS
from .bit_coefficients import LEAST_GAIN
from .compressed_tokens import CompressedTokens
from .rope import TILE_FRAME, Rotation

Sides = tuple[Tensor, Tensor]


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
    keys, values = old
    if len(keys.parts) != 1 or len(values.parts) != 1 or keys.frame is None or len(exact) > 2:
        return None
    first, second = keys.parts[0], values.parts[0]
    alike = first.subspace.basis.shape[1] == second.subspace.basis.shape[1]
    served = all(decode_kernel.applies(query, part.subspace, part.coefficients) for part in (first, second))
    if not (served and alike and all(_is_plain(side) for pair in exact for side in pair)):
        return None
    functions = decode_kernel.library()
    assert functions is not None
    batch, query_heads, _, size = query.shape
    groups, heads = first.subspace.basis.shape[1], keys.heads
    frame, value_size = keys.frame, second.size
    query = query.contiguous()
    out = query.new_empty(batch, query_heads, 1, value_size)
    waves = rotation.tile_waves(offset, keys.tokens)
    sides = [decode_kernel.arguments(part.subspace, part.coefficients) for part in (first, second)]
    runs = [*exact, *[(out[:, :0], out[:, :0])] * (2 - len(exact))]
    sizes = [
        number
        for k, v in runs
        for number in (k.shape[2] if k.shape[1] else 0, k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    ]
    functions.attention(
        query.data_ptr(),
        frame.entries.data_ptr(),
        waves.data_ptr(),
        rotation.offset_waves.data_ptr(),
        *(side.pointers for side in sides),
        (ctypes.c_int64 * (2 * len(WIDTHS)))(*sides[0].counts, *sides[1].counts),
        (ctypes.c_void_p * 4)(*(side.data_ptr() for pair in runs for side in pair)),
        (ctypes.c_int64 * 10)(*sizes),
        out.data_ptr(),
        sides[0].pitch,
        sides[1].pitch,
        batch,
        groups,
        len(first.subspace.mean),
        len(second.subspace.mean),
        heads // groups,
        query_heads // heads,
        size,
        value_size,
        len(rotation.frequencies),
        keys.tokens,
        TILE_FRAME,
        LEAST_GAIN,
        torch.get_num_threads(),
        scale,
    )
    return out


def _is_plain(x: Tensor) -> bool:
    """Whether exact tokens can be read: fp32, a token after the other within a head."""
    return x.dtype == torch.float32 and (x.stride(3), x.stride(2)) == (1, x.shape[3])
