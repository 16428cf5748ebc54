"""Coefficients to packed levels and gains on a CPU, in one compiled function.

The same computation in operations of torch, which serves everywhere else, is in ``bit_coefficients.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .bit_planes import PLANES, byte_rows, plane_counts
from .compiled_functions import compiled_functions

NAMES = (*(f"levels{width}" for width in PLANES), "gains")
"""Names of the codes, in the order in which compiled functions take them."""


def applies(values: Tensor) -> bool:
    """Whether the compiled function can be used.

    It is for tensors without gradients, in fp32 on a CPU, where a C++ compiler is found: see
    :func:`~lowrank_layers.kv_cache.compiled.compiled`.

    Args:
        values: what is encoded.
    """
    return (
        not torch.compiler.is_compiling()
        and type(values) is Tensor
        and values.device.type == "cpu"
        and values.dtype == torch.float32
        and not (values.requires_grad and torch.is_grad_enabled())
        and compiled_functions() is not None
    )


def encode(values: Tensor, weights: Tensor, widths: Sequence[int], least_gain: int, gains: int) -> dict[str, Tensor]:
    """What :meth:`BitCoefficients.encode` gives.

    Args:
        values: ``[batch, groups, rank, tokens]``.
        weights: weights of the directions' squared errors, ``[1 or batch, groups, rank]``.
        widths: numbers of directions with each of ``WIDTHS`` bits.
        least_gain: the least gain.
        gains: the number of gains.
    """
    functions = compiled_functions()
    assert functions is not None
    batch, groups, _, tokens = values.shape
    values, weights = values.contiguous(), weights.to(values).contiguous()
    codes = new_codes(batch, groups, tokens, widths)
    counts = byte_rows(codes, widths)
    functions.encode(
        values.data_ptr(),
        weights.data_ptr(),
        (ctypes.c_void_p * len(codes))(*(code.data_ptr() for code in codes.values())),
        (ctypes.c_int64 * len(counts))(*counts),
        batch * groups,
        len(weights) * groups,
        tokens,
        tokens,
        least_gain,
        gains,
        torch.get_num_threads(),
    )
    return codes


def new_codes(batch: int, groups: int, tokens: int, widths: Sequence[int]) -> dict[str, Tensor]:
    """Codes that are written to.

    Args:
        batch: rows of the batch.
        groups: groups of heads.
        tokens: number of tokens.
        widths: numbers of directions with each of ``WIDTHS`` bits.
    """
    shape = batch, groups
    codes = {
        f"levels{width}": torch.empty(*shape, count * width // 8, tokens, dtype=torch.uint8)
        for width, count in plane_counts(widths).items()
    }
    return codes | {"gains": torch.empty(*shape, tokens, dtype=torch.uint8)}
