"""Inputs and outputs of layers as rows of matrices; for convolutions these are patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernel import ConvNd

_CHUNK = 2**20, 2**24
"""Least and largest number of patch entries formed at once: 4 MiB in fp32 stay in a cache, 64 MiB fit memory."""


class Window(NamedTuple):
    """Kernel size, stride and dilation of a convolution.

    Args:
        size: size of the kernel, per axis.
        stride: stride, per axis.
        dilation: dilation, per axis.
    """

    size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]

    @classmethod
    def of(cls, conv: ConvNd) -> Window:
        """The window of a convolution."""
        return cls(conv.kernel_size, conv.stride, conv.dilation)

    @classmethod
    def point(cls, conv: ConvNd) -> Window:
        """A window of one position, in as many dimensions."""
        ones = (1,) * len(conv.kernel_size)
        return cls(ones, ones, ones)


def input_rows(module: nn.Module, x: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
    """Yields the inputs of a layer's matrix as rows, in chunks; for a convolution these are patches.

    Args:
        module: a layer.
        x: batched input of the layer.
        keep: boolean mask ``[N, *positions]`` of the rows to take; by default all.

    Shape:
        ``[count, in]``; with groups ``[groups, count, in / groups]``.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if not isinstance(module, ConvNd):
        yield _taken(x.reshape(-1, x.shape[-1]), keep)
        return
    if module.transposed:
        yield _taken(_patches(x, Window.point(module), module.groups), keep)
        return
    x = pad_input(module, x)
    area = math.prod(x.shape[2:]) // math.prod(module.stride)
    width = module.in_channels * math.prod(module.kernel_size)
    least, most = _CHUNK
    # several times as many rows as columns, so that products with them cost more than adding these up
    step = max(1, min(max(least, 4 * (width // module.groups) ** 2), most) // max(1, area * width))
    kept = [None] * len(x) if keep is None else torch.split(keep, step)
    for chunk, chosen in zip(torch.split(x, step), kept, strict=False):
        yield _taken(_patches(chunk, Window.of(module), module.groups), chosen)


def _taken(rows: Tensor, keep: Tensor | None) -> Tensor:
    """Selects the rows where the mask is ``True``."""
    return rows if keep is None else rows[..., keep.flatten(), :]


def output_rows(module: nn.Module, y: Tensor, keep: Tensor | None = None) -> Tensor:
    """Returns gradients at the output of a layer's matrix as rows; for a transposed convolution these are patches.

    Args:
        module: a layer.
        y: gradients at the layer's output, batched.
        keep: boolean mask ``[N, *positions]`` of the rows to take; by default all.

    Shape:
        ``[count, out]``; with groups ``[groups, count, out / groups]``.
    """
    y = y if y.dtype == torch.float64 else y.float()
    if not isinstance(module, ConvNd):
        return _taken(y.reshape(-1, y.shape[-1]), keep)
    dims = len(module.kernel_size)
    y = y if y.ndim > dims + 1 else y[None]
    if not module.transposed:
        return _taken(_patches(y, Window.point(module), module.groups), keep)
    pads: list[int] = []
    for axis in range(dims):
        k, s, d, p = (int(v[axis]) for v in (module.kernel_size, module.stride, module.dilation, module.padding))
        n = y.shape[2 + axis] + 2 * p
        whole = (n - d * (k - 1) - 1) // s * s + d * (k - 1) + 1
        pads = [p, whole - n + p, *pads]
    return _taken(_patches(F.pad(y, pads), Window.of(module), module.groups), keep)


def _patches(x: Tensor, window: Window, groups: int) -> Tensor:
    """Cuts ``[N, C, ...]`` into patches and returns them as rows, channels slowest, per group.

    They are stored column by column, whose entries are neighbours in the input.
    """
    dims = len(window.size)
    for axis, (k, s, d) in enumerate(zip(*window, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1))  # [N, groups, C / groups, *positions, *k]
    positions = range(3, 3 + dims)
    area = math.prod(window.size) * x.shape[2]
    rows = x.permute(1, 2, *range(3 + dims, 3 + 2 * dims), 0, *positions).reshape(groups, area, -1).mT
    return rows[0] if groups == 1 else rows


def paddings(conv: ConvNd) -> list[tuple[int, int]]:
    """Returns the padding of a convolution before and after, per axis."""
    if not isinstance(conv.padding, str):
        return [(int(p), int(p)) for p in conv.padding]
    totals = [
        d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in totals]


def pad_input(conv: ConvNd, x: Tensor) -> Tensor:
    """Pads the input of a convolution as the convolution does."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, [n for side in reversed(paddings(conv)) for n in side], mode=mode)
