"""One decoding step over packed levels on a GPU: launches the functions of ``triton_kernels.py``.

The same computations in operations of torch, which serve everywhere else, are in ``compressed_tokens.py``.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import decode_kernel
from .bit_coefficients import LEAST_GAIN, PER_OCTAVE, BitCoefficients
from .bit_planes import PLANES, byte_rows, threes_of
from .coefficients import Coefficients
from .compiled import SWITCH
from .rope import TILE_FRAME, Rotation
from .subspace import Subspace

INTERPRETED = "TRITON_INTERPRET"
"""Triton's environment variable: with ``1`` its functions are computed in Python, on a CPU too."""
PRECISIONS = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "tf32"}
"""Precision of the products by the dtype of the rows; levels and bases are integers, which all of them hold."""
PROGRAMS, RUN = 512, 256
"""Sums over tokens are split into about as many programs, each of at least ``RUN`` tokens."""
RANKS = {"tile_scores": 16, "mixed": 32}
"""Directions at a time; these and two warps for scores were the fastest of those tried on an H200."""
_FAILED: set[torch.device] = set()


@functools.cache
def kernels() -> ModuleType | None:
    """The Triton functions; ``None`` where Triton cannot be imported, and where ``LOWRANK_COMPILE`` is ``0``."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        from . import triton_kernels
    except Exception:  # not installed, or an installation that does not fit the machine
        return None
    return triton_kernels


def applies(rows: Tensor, subspace: Subspace, coefficients: Coefficients) -> bool:
    """Whether the Triton functions can be used.

    They are for few rows without gradients, in fp32, fp16 or bf16 on a GPU (in Triton's interpreter on a CPU too),
    where Triton is installed and has compiled them so far.

    Args:
        rows: queries or weights, ``[batch, heads, q, ...]``.
        subspace: the subspace of the coefficients.
        coefficients: the coefficients.
    """
    return (
        (rows.is_cuda or os.environ.get(INTERPRETED) == "1")
        and decode_kernel.suits(rows, subspace, coefficients)
        and rows.dtype in PRECISIONS
        and rows.device not in _FAILED
        and kernels() is not None
    )


def tile_scores(rows: Tensor, waves: Tensor, subspace: Subspace, coefficients: Coefficients) -> Tensor | None:
    """As :func:`decode_kernel.tile_scores`; ``None`` where it does not apply.

    Args:
        rows: rotated rows, ``[batch, heads, q, size]``.
        waves: cosines and sines of the tiles' centres, as :meth:`Rotation.waves` gives them.
        subspace: the keys' subspace.
        coefficients: the keys' coefficients.
    """
    if not applies(rows, subspace, coefficients):
        return None
    assert subspace.frame is not None
    assert subspace.scale is not None
    rotation = subspace.frame.rotation
    batch, heads, count, size = rows.shape
    groups, tokens, tiles = subspace.mean.shape[1], coefficients.tokens, len(waves)
    inputs = (rows, waves, rotation.offset_waves.to(rows.device), subspace.basis, subspace.scale, subspace.mean)
    scores = rows.new_empty(batch, heads, count, tokens)
    # products take rows by 16: a program has as many tiles as give those
    wide = _power(count, 1)
    at_once = max(1, min(4, 16 // wide))
    done = _launch(
        "tile_scores",
        (heads // groups, -(-tiles // at_once), batch * groups),
        [*(t.contiguous() for t in inputs), *_codes(coefficients), scores],
        [*_counts(coefficients), tokens, count, tiles, len(subspace.mean) * groups],
        LEAST_GAIN=LEAST_GAIN,
        PER_OCTAVE=PER_OCTAVE,
        TILE=TILE_FRAME,
        TILES=at_once,
        COUNT=wide,
        ROWS=_power(wide * at_once),
        SIZE=size,
        RANKS=RANKS["tile_scores"],
        num_warps=2,
        PRECISION=PRECISIONS[rows.dtype],
        **_pairs(rotation, size),
    )
    return scores if done else None


def mixed(weights: Tensor, subspace: Subspace, coefficients: Coefficients) -> Tensor | None:
    """As :func:`decode_kernel.mixed`; ``None`` where it does not apply.

    Args:
        weights: ``[batch, heads, q, tokens]``.
        subspace: the values' subspace.
        coefficients: the values' coefficients.
    """
    if not applies(weights, subspace, coefficients):
        return None
    assert subspace.scale is not None
    batch, heads, count, tokens = weights.shape
    assert isinstance(coefficients, BitCoefficients)
    groups, width, rank = subspace.basis.shape[1:]
    threes = threes_of(coefficients.widths)
    rank += threes  # levels, of which a direction with 3 bits has two
    rows = heads // groups * count
    flat = weights.flatten(0, 2)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    at_once = min(_power(rows), 64)
    outer = -(-rows // at_once) * batch * groups
    blocks = max(1, -(-rank // RANKS["mixed"]))
    run = max(RUN, -(-tokens // max(1, PROGRAMS // (blocks * outer))))
    runs = -(-tokens // run)
    sums = weights.new_empty(runs, batch, groups, heads // groups, count, rank + 1, dtype=torch.float32)
    done = _launch(
        "mixed",
        (blocks, runs, outer),
        [flat, *_codes(coefficients), sums],
        [*_counts(coefficients), tokens, rows, flat.stride(0), run],
        LEAST_GAIN=LEAST_GAIN,
        PER_OCTAVE=PER_OCTAVE,
        ROWS=at_once,
        RANKS=RANKS["mixed"],
        TOKENS=64,
        PRECISION=PRECISIONS[weights.dtype],
    )
    if not done:
        return None
    inner, total = sums.sum(0).split([rank, 1], -1)
    if threes:
        low, high = sum(coefficients.widths[:2]), sum(coefficients.widths[:4])
        inner, again, last = inner.split([high, threes, rank - high - threes], -1)
        inner[..., low : low + threes] += 4 * again
        inner = torch.cat([inner, last], -1)
    shape = (heads // groups, width * groups // heads)
    basis, mean = subspace.basis.float().unflatten(2, shape), subspace.mean.unflatten(2, shape)
    values: Tensor = (inner * subspace.scale[:, :, None, None]) @ basis.mT + total * mean[..., None, :]
    return values.flatten(1, 2).to(weights.dtype)


def _launch(name: str, grid: tuple[int, ...], tensors: list[Tensor], sizes: list[int], **constants: Any) -> bool:
    """Whether a function has run; where it has not once, it is not tried again."""
    device = tensors[0].device
    try:
        with torch.cuda.device_of(tensors[0]):
            getattr(kernels(), name)[grid](*tensors, *sizes, **constants)
    except Exception as error:  # a compiler that is missing, a GPU that it does not know, too little shared memory
        _FAILED.add(device)
        warnings.warn(
            f"Triton failed on {device}, operations of torch serve instead, which are slower: {error}", stacklevel=2
        )
        return False
    return True


def _codes(coefficients: Coefficients) -> list[Tensor]:
    return [coefficients.codes[key].contiguous() for key in (*(f"levels{width}" for width in PLANES), "gains")]


def _counts(coefficients: Coefficients) -> list[int]:
    """Rows of bytes by width, and directions with 3 bits."""
    assert isinstance(coefficients, BitCoefficients)
    return byte_rows(coefficients.codes, coefficients.widths)


def _pairs(rotation: Rotation, size: int) -> dict[str, int]:
    """Where the pairs of a head lie, and to how many they and the other entries are filled up."""
    pairs = len(rotation.frequencies)
    rest = size - 2 * pairs
    return {
        "START": rotation.start,
        "PAIRS": pairs,
        "STEP": 2 if rotation.interleaved else 1,
        "APART": 1 if rotation.interleaved else pairs,
        "MOST_PAIRS": _power(pairs),
        "MOST_REST": _power(rest) if rest else 0,
    }


def _power(number: int, least: int = 16) -> int:
    """The next power of two."""
    return max(least, 1 << (number - 1).bit_length())
