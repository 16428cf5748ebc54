"""MXINT8: blocks of integers that share a power of two, in a quarter of the bytes of fp32."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Numbers per scale."""

_CODES = {8: torch.int8, 16: torch.int16}
_BIAS = 127
_NAN = 255


def pack(rows: Tensor, bits: int) -> Tensor:
    """Packs ``[n, 32 k]`` in fp32 into bytes ``[n, ...]``: the integers, then one exponent per block.

    This is MXINT8 of the OCP Microscaling Formats Specification 1.0 (2023), and the same with 16 bits. The largest
    number of a block uses all bits but the sign's, so that packing an unpacked tensor is exact. A block with a number
    that is not finite is unpacked as NaN.

    Args:
        rows: the numbers.
        bits: 8 or 16 bits per number.
    """
    blocks = rows.view(len(rows), -1, BLOCK)
    largest = torch.maximum(blocks.amax(-1), -blocks.amin(-1))
    exponents = (torch.frexp(largest).exponent - (bits - 1)).clamp_(1 - _BIAS, _BIAS - 1)
    top = 2 ** (bits - 1) - 1
    codes = blocks * _power_of_two(-exponents).unsqueeze(-1)
    codes = codes.nan_to_num_(0.0).round_().clamp_(-top, top).to(_CODES[bits])
    exponents = torch.where(largest.isfinite(), exponents + _BIAS, _NAN).to(torch.uint8)
    return torch.cat([codes.view(len(rows), -1).view(torch.uint8), exponents], 1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack`, up to its rounding.

    Args:
        packed: bytes that :func:`pack` returned.
        bits: 8 or 16, as given to :func:`pack`.
    """
    count = packed.shape[1] // (BLOCK * bits // 8 + 1)
    codes, exponents = packed.split([packed.shape[1] - count, count], 1)
    blocks = codes.flatten().clone().view(_CODES[bits]).view(len(packed), count, BLOCK).float()
    scales = _power_of_two(exponents.int() - _BIAS).masked_fill_(exponents == _NAN, torch.nan)
    numbers: Tensor = blocks.mul_(scales.unsqueeze(-1)).view(len(packed), -1)
    return numbers


def padded(count: int) -> int:
    """The smallest multiple of the block size that holds ``count`` numbers."""
    return -(-count // BLOCK) * BLOCK


def _power_of_two(exponents: Tensor) -> Tensor:
    """Exact powers of two, from the bits of fp32; for exponents from -126 to 127."""
    return ((exponents + _BIAS) << 23).view(torch.float32)
