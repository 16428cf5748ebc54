"""The second moment of rows, in one compiled function where it serves: half of a product that is symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from . import encode_kernel
from .compiled_functions import compiled_functions

FEW = 256
"""Rows up to which a product is as fast."""


def second_moment(rows: Tensor) -> Tensor:
    """``rows^T rows``, ``[batch, groups, width, width]``.

    Args:
        rows: ``[batch, groups, tokens, width]``.
    """
    if rows.shape[2] > FEW and encode_kernel.applies(rows):
        functions, rows = compiled_functions(), rows.contiguous()
        assert functions is not None
        batch, groups, tokens, width = rows.shape
        found = rows.new_zeros(batch, groups, width, width)
        sizes = batch * groups, tokens, width, width, torch.get_num_threads()
        if functions.second_moment(rows.data_ptr(), found.data_ptr(), *sizes):
            return found
    return rows.mT @ rows
