"""Tokens as they come to packed levels and gains on a CPU, in one compiled function.

The same computations in operations of torch, which serve everywhere else, are in ``compressed_tokens.py``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .bit_coefficients import GAINS, LEAST_GAIN, BitCoefficients
from .bit_planes import byte_rows
from .coefficients import Coefficients
from .compiled_functions import compiled_functions
from .encode_kernel import NAMES, new_codes
from .leaving_tokens import LeavingTokens
from .rope import TILE_FRAME
from .subspace import Subspace

MANY = 256
"""Tokens for which it is worth to solve for what takes rows to coefficients."""
STEPS = 3, 5
"""Steps of an iteration that does without, in no metric and in one: a step leaves about 3 % and 15 % of the error."""


def applies(tokens: LeavingTokens, subspace: Subspace, coefficients: Coefficients) -> bool:
    """Whether the compiled function can be used.

    It is for tensors without gradients on a CPU, with the same positions in every row of the batch, where a C++
    compiler is found: see :func:`~lowrank_layers.kv_cache.compiled.compiled`.

    Args:
        tokens: what is compressed.
        subspace: its subspace.
        coefficients: where it is stored.
    """
    exact = tokens.exact
    return (
        isinstance(coefficients, BitCoefficients)
        and not torch.compiler.is_compiling()
        and type(exact) is Tensor
        and exact.device.type == "cpu"
        and not (exact.requires_grad and torch.is_grad_enabled())
        and tokens.positions is None
        and (tokens.rotation is None) == (subspace.frame is None)
        and subspace.basis.dtype == torch.int8
        and subspace.mean.dtype == torch.float32
        and compiled_functions() is not None
    )


def compress(
    tokens: LeavingTokens, subspace: Subspace, coefficients: Coefficients, looked_at: slice
) -> tuple[float, float]:
    """Does what :meth:`HeadGroups.add` does.

    Args:
        tokens: the tokens that follow.
        subspace: their subspace.
        coefficients: those of the tokens before, to which theirs are added.
        looked_at: the tokens whose energy is measured.
    """
    functions = compiled_functions()
    assert functions is not None
    assert isinstance(coefficients, BitCoefficients)
    exact = tokens.exact.float()
    exact = exact if exact.stride(3) == 1 else exact.contiguous()
    batch, heads, count, size = exact.shape
    groups, held, metric, scale = subspace.mean.shape[1], coefficients.tokens, subspace.metric, subspace.scale
    assert scale is not None
    analysis = subspace.analysis() if subspace.shared or count >= MANY else None
    waves: tuple[Tensor | None, ...] = (None, None, None)
    pairs = 0
    if subspace.frame is not None:
        rotation = subspace.frame.rotation
        pairs = len(rotation.frequencies)
        centres = rotation.tile_waves(tokens.start - held, held + count)
        waves = (centres.contiguous(), rotation.offset_waves, subspace.frame.entries)
    if not coefficients.codes:
        coefficients.append_codes(new_codes(batch, groups, 0, coefficients.widths))
    room = coefficients.room(count)
    codes = [room[name] for name in NAMES]
    weights = coefficients.weights.to(exact).contiguous()
    energies = torch.empty(batch * groups, 2, dtype=torch.double)
    counts = byte_rows(room, coefficients.widths)
    inputs = (subspace.mean, analysis, subspace.basis, scale, metric)
    kept = [None if t is None else t.contiguous() for t in inputs]
    functions.compress_tokens(
        exact.data_ptr(),
        (ctypes.c_int64 * 3)(*exact.stride()[:3]),
        *(None if t is None else t.data_ptr() for t in (*waves, *kept)),
        weights.data_ptr(),
        (ctypes.c_void_p * len(codes))(*(code.data_ptr() for code in codes)),
        (ctypes.c_int64 * len(counts))(*counts),
        energies.data_ptr(),
        batch,
        groups,
        len(subspace.mean),
        len(weights),
        heads // groups,
        size,
        pairs,
        held,
        count,
        TILE_FRAME,
        codes[-1].shape[-1],
        STEPS[metric is not None],
        looked_at.start,
        looked_at.stop,
        LEAST_GAIN,
        GAINS,
        torch.get_num_threads(),
    )
    coefficients.show(held + count)
    lost, whole = energies.sum(0).tolist()
    return lost, whole
