"""One decoding step over packed levels on a CPU, in one compiled function per side.

The same computations in operations of torch, which serve everywhere else, are in ``compressed_tokens.py``.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bit_coefficients import LEAST_GAIN, BitCoefficients
from .bit_planes import PLANES, byte_rows
from .coefficients import Coefficients
from .compiled_functions import compiled_functions
from .rope import TILE_FRAME
from .subspace import Subspace

MOST_ROWS = 32
"""Most rows per head that are computed so: for more the levels are unpacked once, for a product of matrices."""


def applies(rows: Tensor, subspace: Subspace, coefficients: Coefficients) -> bool:
    """Whether the compiled functions can be used.

    They are for few rows without gradients, in fp32 on a CPU, where a C++ compiler is found: see
    :func:`~lowrank_layers.kv_cache.compiled.compiled`.

    Args:
        rows: queries or weights, ``[batch, heads, q, ...]``.
        subspace: the subspace of the coefficients.
        coefficients: the coefficients.
    """
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and suits(rows, subspace, coefficients)
        and compiled_functions() is not None
    )


def suits(rows: Tensor, subspace: Subspace, coefficients: Coefficients) -> bool:
    """Whether there are few rows without gradients, and packed levels with a basis in int8.

    Args:
        rows: queries or weights, ``[batch, heads, q, ...]``.
        subspace: the subspace of the coefficients.
        coefficients: the coefficients.
    """
    return (
        isinstance(coefficients, BitCoefficients)
        and not torch.compiler.is_compiling()
        and type(rows) is Tensor
        and rows.shape[2] <= MOST_ROWS
        and not (rows.requires_grad and torch.is_grad_enabled())
        and subspace.basis.dtype == torch.int8
        and subspace.mean.dtype == torch.float32
    )


def tile_scores(rows: Tensor, waves: Tensor, subspace: Subspace, coefficients: Coefficients) -> Tensor:
    """Products of rows with keys in the frame of their tile, ``[batch, heads, q, tokens]``.

    Rows, their products with the basis and their coefficients are rounded to integers of 16 bits, whose sums are exact:
    twice as fast as fp32, and far below what the levels of keys are rounded by.

    Args:
        rows: rotated rows, ``[batch, heads, q, size]``.
        waves: cosines and sines of the tiles' centres, as :meth:`Rotation.waves` gives them.
        subspace: the keys' subspace.
        coefficients: the keys' coefficients.
    """
    frame = subspace.frame
    assert frame is not None
    batch, heads, count, size = rows.shape
    rows = rows.contiguous()
    scores = rows.new_empty(batch, heads, count, coefficients.tokens)
    sizes = (size, len(frame.rotation.frequencies), coefficients.tokens, TILE_FRAME)
    _call(
        "tile_scores",
        [rows, frame.entries, waves.contiguous(), frame.rotation.offset_waves],
        scores,
        sizes,
        subspace,
        coefficients,
    )
    return scores


def mixed(weights: Tensor, subspace: Subspace, coefficients: Coefficients) -> Tensor:
    """Weighted sums of values, ``[batch, heads, q, size]``.

    Weights, times the gains of their tokens, are rounded to integers of 16 bits in units of the greatest of a run of
    tokens, and what is rounded off one is added to the next: far below what the levels of values are rounded by.

    Args:
        weights: ``[batch, heads, q, tokens]``.
        subspace: the values' subspace.
        coefficients: the values' coefficients.
    """
    batch, heads, count, tokens = weights.shape
    groups, width = subspace.mean.shape[1:]
    size = width * groups // heads
    flat = weights.flatten(0, 2)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    values = weights.new_empty(batch, heads, count, size)
    _call("mixed", [flat], values, (size, tokens, flat.stride(0)), subspace, coefficients)
    return values


@dataclass(frozen=True, eq=False)
class Arguments:
    """What the compiled functions read of a subspace and of coefficients in it.

    Args:
        tensors: the tensors that ``pointers`` points to, which it keeps alive.
        pointers: those of basis, scale, mean, levels by width and gains.
        counts: rows of bytes by width, and directions with 3 bits.
        pitch: distance from one row of bytes to the next.
    """

    tensors: Sequence[Tensor]
    pointers: ctypes.Array[ctypes.c_void_p]
    counts: Sequence[int]
    pitch: int


def arguments(subspace: Subspace, coefficients: Coefficients) -> Arguments:
    """What the compiled functions read; kept until other tensors are stored.

    Args:
        subspace: the subspace.
        coefficients: coefficients in it.
    """
    assert isinstance(coefficients, BitCoefficients)
    codes = coefficients.codes
    given = [subspace.basis, subspace.scale, subspace.mean, *codes.values()]
    held = vars(coefficients).get("_arguments")
    if held is not None and len(held[0]) == len(given) and all(map(operator.is_, held[0], given)):
        found: Arguments = held[1]
        return found
    assert subspace.scale is not None
    bases = [t.contiguous() for t in (subspace.basis, subspace.scale, subspace.mean)]
    parts = [codes[key] for key in (*(f"levels{width}" for width in PLANES), "gains")]
    pitch = parts[-1].stride(-2)
    if any(not _has_pitch(part, pitch) for part in parts):
        parts, pitch = [part.contiguous() for part in parts], coefficients.tokens
    tensors = [*bases, *parts]
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    found = Arguments(tensors, pointers, byte_rows(codes, coefficients.widths), pitch)
    vars(coefficients)["_arguments"] = given, found
    return found


def _has_pitch(x: Tensor, pitch: int) -> bool:
    """Whether rows of tokens follow each other at a distance."""
    expected = [1, pitch]
    for size in reversed(x.shape[1:-1]):
        expected.append(expected[-1] * size)
    pairs = zip(reversed(x.shape), reversed(x.stride()), expected, strict=True)
    return x.numel() == 0 or all(size == 1 or stride == wanted for size, stride, wanted in pairs)


def _call(
    name: str,
    inputs: list[Tensor],
    output: Tensor,
    sizes: tuple[int, ...],
    subspace: Subspace,
    coefficients: Coefficients,
) -> None:
    functions = compiled_functions()
    assert functions is not None
    batch, heads, count, _ = output.shape
    groups, given = subspace.mean.shape[1], arguments(subspace, coefficients)
    basis = len(given.tensors) - len(PLANES) - 1
    getattr(functions, name)(
        *(t.data_ptr() for t in (*inputs, *given.tensors[:basis])),
        (ctypes.c_void_p * (len(PLANES) + 1))(*given.pointers[basis:]),
        output.data_ptr(),
        (ctypes.c_int64 * len(given.counts))(*given.counts),
        given.pitch,
        batch * groups,
        len(subspace.mean) * groups,
        heads // groups,
        count,
        *sizes,
        LEAST_GAIN,
        torch.get_num_threads(),
    )
