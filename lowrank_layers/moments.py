"""What calibration gathers: rows as a layer's weight matrix sees them, and their running second moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNd

_CHUNK = 2**24
"""Most patch entries formed at once (64 MiB in fp32)."""


@dataclass
class Moments:
    """Running mean and second moment of rows, in fp64.

    Args:
        mean: ``[n]``, or ``[groups, n]``.
        second: ``E[x x^T]``, ``[n, n]`` (``[groups, n, n]``); its diagonal ``[n]`` for one-hot rows (embeddings).
        rows: how many rows went in.
    """

    mean: Tensor
    second: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, n: int, device: torch.device, *, groups: int = 1, diagonal: bool = False) -> Moments:
        """Nothing seen yet."""
        device = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        mean = torch.zeros((n,) if groups == 1 else (groups, n), dtype=torch.float64, device=device)
        return cls(mean, mean.clone() if diagonal else mean.new_zeros(*mean.shape, n))

    def update(self, rows: Tensor) -> None:
        """Takes in ``[count, n]`` (``[groups, count, n]``): products in fp32 at least, sums in fp64."""
        if rows.shape[-2]:
            self._add(*sums(rows), rows.shape[-2])

    def update_counts(self, indices: Tensor) -> None:
        """Takes in one-hot rows, given by their index."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.mean))
        self._add(counts, counts, indices.numel())

    def _add(self, total: Tensor, products: Tensor, count: int) -> None:
        if count == 0:
            return
        self.rows += count
        keep = 1 - count / self.rows
        self.mean.mul_(keep).add_(total.to(self.mean), alpha=1 / self.rows)
        self.second.mul_(keep).add_(products.to(self.second), alpha=1 / self.rows)

    def covariance(self) -> Tensor:
        """``E[x x^T] - E[x] E[x]^T``; a diagonal stays as it is, since one-hot rows are not centred."""
        if self.second.ndim == 1:
            return self.second
        return self.second - self.mean[..., :, None] * self.mean[..., None, :]

    def group(self, index: int) -> Moments:
        """Those of one group."""
        return self if self.mean.ndim == 1 else Moments(self.mean[index], self.second[index], self.rows)


@dataclass
class LayerStats:
    """What calibration knows of one layer.

    Args:
        inputs: moments of the inputs (a convolution's patches, group by group); of those that the already compressed
            prefix delivers, when ``cross`` is there.
        gradients: ``E[g g^T]`` of the loss's gradients at the output, ``[m, m]``, or ``None``.
        input_shape: shape of one sample's input, without the batch.
        positions: rows per sample of the model, summed over calls; padding is not counted.
        repeats: how many such inputs the layer takes for one sample of the model (a shared layer: one a call); fewer
            where other samples have fewer positions.
        cross: ``E[x x'^T] - E[x] E[x']^T`` of the dense model's inputs ``x`` and the compressed one's ``x'``.
        target_mean: ``E[x]``.
        traced: whether its outputs were part of a graph of gradients (not so under ``torch.no_grad``).
        free_bias: whether the factored layer may have a bias where the dense one has none.
    """

    inputs: Moments
    gradients: Tensor | None = None
    input_shape: tuple[int, ...] | None = None
    positions: float = 1.0
    repeats: float = 1.0
    cross: Tensor | None = None
    target_mean: Tensor | None = None
    traced: bool = True
    free_bias: bool = True

    def group(self, index: int) -> LayerStats:
        """Those of one group of a grouped convolution."""
        if self.inputs.mean.ndim == 1:
            return self
        parts = (None if t is None else t[index] for t in (self.gradients, self.cross, self.target_mean))
        gradients, cross, target_mean = parts
        inputs = self.inputs.group(index)
        return replace(self, inputs=inputs, gradients=gradients, cross=cross, target_mean=target_mean)


@dataclass
class Statistics(Mapping[str, LayerStats]):
    """Layer name to :class:`LayerStats`, and how they were taken.

    Args:
        layers: the statistics of every calibrated layer that was called.
        samples: how many samples were seen.
        with_target: whether the last item of a tuple batch is the target.
        other_macs: MACs per sample of layers that are counted but not calibrated (those with a computed weight).
        mask: how the padding of a batch is found, as given to :func:`calibrate`.
    """

    layers: dict[str, LayerStats] = field(default_factory=dict)
    samples: int = 0
    with_target: bool = False
    other_macs: int = 0
    mask: str | Callable[[Any], Tensor] | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str) -> LayerStats:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def sums(rows: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of ``others [count, n]``, by default the rows themselves, and ``others^T rows``.

    Products are formed in fp32 at least, whatever autocast says, of rows scaled towards one: squares of 1e25 do not
    overflow, those of 1e-25 do not vanish. The sums are returned in fp64.
    """
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    with torch.autocast(rows.device.type, enabled=False):
        unit, size = _to_one(rows)
        other, other_size = (unit, size) if others is None else _to_one(others)
        total, products = other.sum(-2).to(wide), (other.mT @ unit).to(wide)
        if other_size is not None:
            total, products = total * other_size.to(wide), products.mul_(other_size.to(wide))
        return total, products if size is None else products.mul_(size.to(wide))


def _to_one(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows in fp32 at least, over a power of two near their largest entry, and that power; ``None`` for one."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = torch.maximum(*(end.abs() for end in rows.aminmax()))
    if rows.device.type == "cpu" and 1e-9 < float(largest) < 1e9:  # elsewhere asking would wait for the device
        return rows, None
    power = torch.frexp(largest).exponent.clamp(-120, 120)
    return torch.ldexp(rows, -power), torch.ldexp(torch.ones_like(largest), power)


def input_rows(module: nn.Module, x: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
    """The inputs as rows of the layer's matrix: a convolution's patches, in chunks.

    Args:
        module: a layer.
        x: its batched input.
        keep: boolean, ``[N, *positions]``: which rows to take; by default all.

    Shape:
        ``[count, in]``; with groups ``[groups, count, in / groups]``.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if not isinstance(module, ConvNd):
        yield _taken(x.reshape(-1, x.shape[-1]), keep)
        return
    if module.transposed:
        ones = (1,) * len(module.kernel_size)
        yield _taken(_patches(x, ones, ones, ones, module.groups), keep)
        return
    x = pad_input(module, x)
    area = math.prod(x.shape[2:]) // math.prod(module.stride)
    step = max(1, _CHUNK // max(1, area * module.in_channels * math.prod(module.kernel_size)))
    kept = [None] * len(x) if keep is None else torch.split(keep, step)
    for chunk, chosen in zip(torch.split(x, step), kept, strict=False):
        yield _taken(_patches(chunk, module.kernel_size, module.stride, module.dilation, module.groups), chosen)


def _taken(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else rows[..., keep.flatten(), :]


def output_rows(module: nn.Module, y: Tensor, keep: Tensor | None = None) -> Tensor:
    """The gradients at the output as rows of what the layer's matrix makes: a transposed convolution's patches.

    Shape:
        ``[count, out]``; with groups ``[groups, count, out / groups]``.
    """
    y = y if y.dtype == torch.float64 else y.float()
    if not isinstance(module, ConvNd):
        return _taken(y.reshape(-1, y.shape[-1]), keep)
    dims = len(module.kernel_size)
    y = y if y.ndim > dims + 1 else y[None]
    ones = (1,) * dims
    if not module.transposed:
        return _taken(_patches(y, ones, ones, ones, module.groups), keep)
    pads: list[int] = []
    for axis in range(dims):
        k, s, d, p = (int(v[axis]) for v in (module.kernel_size, module.stride, module.dilation, module.padding))
        n = y.shape[2 + axis] + 2 * p
        whole = (n - d * (k - 1) - 1) // s * s + d * (k - 1) + 1
        pads = [p, whole - n + p, *pads]
    patches = _patches(F.pad(y, pads), module.kernel_size, module.stride, module.dilation, module.groups)
    return _taken(patches, keep)


def _patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """``[N, C, ...]`` as rows of patches, channels slowest, group by group."""
    dims = len(kernel)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1))  # [N, groups, C / groups, *positions, *k]
    positions = range(3, 3 + dims)
    area = math.prod(kernel) * x.shape[2]
    rows = x.permute(1, 0, *positions, 2, *range(3 + dims, 3 + 2 * dims)).reshape(groups, -1, area)
    return rows[0] if groups == 1 else rows


def paddings(conv: ConvNd) -> list[tuple[int, int]]:
    """How far a convolution pads each axis, before and after."""
    if not isinstance(conv.padding, str):
        return [(int(p), int(p)) for p in conv.padding]
    totals = [
        d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in totals]


def pad_input(conv: ConvNd, x: Tensor) -> Tensor:
    """What the convolution sees: its input padded by its own numbers and mode."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, [n for side in reversed(paddings(conv)) for n in side], mode=mode)
