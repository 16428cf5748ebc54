"""The second moment of rows, in one compiled function where it serves: half of a product that is symmetric."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from . import encode_kernel
from .compiled import compiled

FEW = 256
"""Rows up to which a product is as fast."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, as :func:`~lowrank_layers.kv_cache.compiled.compiled` gives them."""
    functions = compiled(encode_kernel.SOURCES)
    if functions is not None:
        functions.second_moment.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 5
        functions.second_moment.restype = ctypes.c_int64
    return functions


def second_moment(rows: Tensor) -> Tensor:
    """``rows^T rows``, ``[batch, groups, width, width]``.

    Args:
        rows: ``[batch, groups, tokens, width]``.
    """
    if rows.shape[2] > FEW and encode_kernel.applies(rows):
        functions, rows = library(), rows.contiguous()
        assert functions is not None
        batch, groups, tokens, width = rows.shape
        found = rows.new_zeros(batch, groups, width, width)
        sizes = batch * groups, tokens, width, width, torch.get_num_threads()
        if functions.second_moment(rows.data_ptr(), found.data_ptr(), *sizes):
            return found
    return rows.mT @ rows
