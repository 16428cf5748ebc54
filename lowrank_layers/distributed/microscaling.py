"""Integers that share a power of two in blocks: gradients and errors in a quarter of fp32's bytes."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Numbers that share a scale."""

_CODES = {8: torch.int8, 16: torch.int16}
_BIAS = 127
_NOT_A_NUMBER = 255


def pack(rows: Tensor, bits: int) -> Tensor:
    """``[n, 32 k]`` in fp32 as bytes ``[n, ...]``: the codes, then one exponent a block.

    MXINT8 of the OCP Microscaling Formats Specification 1.0 (2023), and the same with 16 bits. The greatest number of a
    block has all bits but the sign's, so that packing what was unpacked changes nothing. A block with a number that is
    not finite comes back as NaN.
    """
    blocks = rows.view(len(rows), -1, BLOCK)
    greatest = torch.maximum(blocks.amax(-1), -blocks.amin(-1))
    exponents = (torch.frexp(greatest).exponent - (bits - 1)).clamp_(1 - _BIAS, _BIAS - 1)
    top = 2 ** (bits - 1) - 1
    codes = blocks * _power_of_two(-exponents).unsqueeze(-1)
    codes = codes.nan_to_num_(0.0).round_().clamp_(-top, top).to(_CODES[bits])
    exponents = torch.where(greatest.isfinite(), exponents + _BIAS, _NOT_A_NUMBER).to(torch.uint8)
    return torch.cat([codes.view(len(rows), -1).view(torch.uint8), exponents], 1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of :func:`pack`."""
    count = packed.shape[1] // (BLOCK * bits // 8 + 1)
    codes, exponents = packed.split([packed.shape[1] - count, count], 1)
    blocks = codes.flatten().clone().view(_CODES[bits]).view(len(packed), count, BLOCK).float()
    scales = _power_of_two(exponents.int() - _BIAS).masked_fill_(exponents == _NOT_A_NUMBER, torch.nan)
    numbers: Tensor = blocks.mul_(scales.unsqueeze(-1)).view(len(packed), -1)
    return numbers


def room(count: int) -> int:
    """Of so many numbers, in whole blocks."""
    return -(-count // BLOCK) * BLOCK


def _power_of_two(exponents: Tensor) -> Tensor:
    """Exact, from the bits of fp32; of those from -126 to 127."""
    return ((exponents + _BIAS) << 23).view(torch.float32)
