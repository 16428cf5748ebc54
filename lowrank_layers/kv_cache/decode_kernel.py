"""One decoding step over packed levels on a CPU, in one compiled function per side.

The same computations in operations of torch, which serve everywhere else, are in ``compressed_tokens.py``.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .bit_allocation import WIDTHS
from .bit_coefficients import LEAST_GAIN, BitCoefficients
from .coefficients import Coefficients
from .compiled import compiled
from .rope import TILE_FRAME
from .subspace import Subspace

SOURCES = Path(__file__).with_name("kernels")
MOST_ROWS = 32
"""Most rows per head that are computed so: for more the levels are unpacked once, for a product of matrices."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, as :func:`~lowrank_layers.kv_cache.compiled.compiled` gives them."""
    functions = compiled(SOURCES)
    if functions is not None:
        functions.tile_scores.argtypes = [ctypes.c_void_p] * 10 + [ctypes.c_int64] * 10
        functions.mixed.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 9
    return functions


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
        isinstance(coefficients, BitCoefficients)
        and not torch.compiler.is_compiling()
        and type(rows) is Tensor
        and rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and rows.shape[2] <= MOST_ROWS
        and not (rows.requires_grad and torch.is_grad_enabled())
        and subspace.basis.dtype == torch.int8
        and subspace.mean.dtype == torch.float32
        and library() is not None
    )


def tile_scores(rows: Tensor, waves: Tensor, subspace: Subspace, coefficients: Coefficients) -> Tensor:
    """Products of rows with keys in the frame of their tile, ``[batch, heads, q, tokens]``.

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


def _call(
    name: str,
    inputs: list[Tensor],
    output: Tensor,
    sizes: tuple[int, ...],
    subspace: Subspace,
    coefficients: Coefficients,
) -> None:
    functions, scale = library(), subspace.scale
    assert functions is not None
    assert scale is not None
    batch, heads, count, _ = output.shape
    groups = subspace.mean.shape[1]
    bases = [t.contiguous() for t in (subspace.basis, scale, subspace.mean)]
    codes = [coefficients.codes[key].contiguous() for key in (*(f"levels{width}" for width in WIDTHS), "gains")]
    getattr(functions, name)(
        *(t.data_ptr() for t in (*inputs, *bases)),
        (ctypes.c_void_p * len(codes))(*(code.data_ptr() for code in codes)),
        output.data_ptr(),
        (ctypes.c_int64 * len(WIDTHS))(*(code.shape[2] for code in codes[:-1])),
        batch * groups,
        len(subspace.mean) * groups,
        heads // groups,
        count,
        *sizes,
        LEAST_GAIN,
        torch.get_num_threads(),
    )
