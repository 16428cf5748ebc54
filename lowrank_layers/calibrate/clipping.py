"""Scaling down rows of inputs that are much longer than the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import is_number
from ..errors import LowRankError
from ..layers import ConvNd, is_embedding


def check_clip(clip: object) -> None:
    """Raises for what is neither ``None`` nor a number of at least one."""
    if clip is not None and not (is_number(clip) and 1 <= clip < math.inf):
        raise LowRankError(f"calibrate: got clip={clip!r}, expected None or a finite number of at least 1, such as 10.")


def clipped(module: nn.Module, clip: float | None, rows: Tensor, *others: Tensor) -> list[Tensor]:
    """Returns rows, those longer than ``clip`` times the median of their lengths scaled down to that.

    Where the median is zero, nothing is scaled.

    Args:
        module: the layer; for convolutions and embeddings the rows come back as they are.
        clip: the limit; ``None`` for none.
        rows: the inputs of one call of it that are data.
        *others: rows that are multiplied by the same factors.

    Shape:
        ``[count, n]`` each.
    """
    if clip is None or isinstance(module, ConvNd) or is_embedding(module) or not len(rows):
        return [rows, *others]
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
    limit = clip * norms.median()
    scale = torch.where((norms > limit) & (limit > 0), limit / norms, 1.0)
    return [each * scale.to(each) for each in (rows, *others)]
