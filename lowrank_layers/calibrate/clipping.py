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


def clip_scale(module: nn.Module, rows: Tensor, clip: float | None) -> Tensor | None:
    """Returns what each row is multiplied by, so that none is longer than ``clip`` times the median of their lengths.

    Where the median is zero, nothing is scaled.

    Args:
        module: the layer; convolutions and embeddings are left alone.
        rows: the inputs of one call of it that are data.
        clip: the limit; ``None`` for none.

    Shape:
        rows ``[count, n]``, result ``[count, 1]``; ``None`` where no row is scaled.
    """
    if clip is None or isinstance(module, ConvNd) or is_embedding(module) or not len(rows):
        return None
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=_widest(rows))
    limit = clip * norms.median()
    return torch.where((norms > limit) & (limit > 0), limit / norms, 1.0).to(rows)


def clipped(module: nn.Module, rows: Tensor, clip: float | None) -> Tensor:
    """Returns the rows, the long ones scaled as :func:`clip_scale` says.

    Args:
        module: the layer.
        rows: the inputs of one call of it that are data.
        clip: the limit; ``None`` for none.
    """
    scale = clip_scale(module, rows, clip)
    return rows if scale is None else rows * scale


def _widest(rows: Tensor) -> torch.dtype:
    return torch.float32 if rows.device.type == "mps" else torch.float64
