"""What calibration gathers: rows as a layer's weight matrix sees them, and their running second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 2**24
"""Most patch entries formed at once (64 MiB in fp32)."""


@dataclass
class Moments:
    """Running mean and second moment of rows, in fp64.

    Args:
        mean: ``[n]``.
        second: ``E[x x^T]``, ``[n, n]``; its diagonal ``[n]`` for one-hot rows (embeddings).
        rows: how many rows went in.
    """

    mean: Tensor
    second: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, n: int, device: torch.device, *, diagonal: bool = False) -> Moments:
        """Nothing seen yet."""
        device = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        mean = torch.zeros(n, dtype=torch.float64, device=device)
        return cls(mean, mean.clone() if diagonal else mean.new_zeros(n, n))

    def update(self, rows: Tensor) -> None:
        """Takes in ``[count, n]``: products in the precision of the data, sums in fp64."""
        self._add(rows.sum(0), rows.mT @ rows, len(rows))

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
        return self.second if self.second.ndim == 1 else self.second - torch.outer(self.mean, self.mean)


@dataclass
class LayerStats:
    """What calibration knows of one layer.

    Args:
        inputs: moments of the inputs (a convolution's patches); of the already compressed prefix's, when
            ``cross`` is there.
        gradients: ``E[g g^T]`` of the loss's gradients at the output, ``[m, m]``, or ``None``.
        input_shape: shape of one sample's input, without the batch.
        positions: rows a sample of the model, over all calls.
        repeats: how many such inputs the layer takes for one sample of the model (a shared layer: one a call).
        cross: ``E[x x'^T] - E[x] E[x']^T`` of the dense model's inputs ``x`` and the compressed one's ``x'``.
        target_mean: ``E[x]``.
    """

    inputs: Moments
    gradients: Tensor | None = None
    input_shape: tuple[int, ...] | None = None
    positions: float = 1.0
    repeats: float = 1.0
    cross: Tensor | None = None
    target_mean: Tensor | None = None


@dataclass
class Statistics(Mapping[str, LayerStats]):
    """Layer name to :class:`LayerStats`, and how they were taken.

    Args:
        layers: the statistics of every calibrated layer that was called.
        samples: how many samples were seen.
        with_target: whether the last item of a tuple batch is the target.
        other_macs: MACs a sample of layers that are counted but not calibrated (grouped and 1-d, 3-d convolutions).
    """

    layers: dict[str, LayerStats] = field(default_factory=dict)
    samples: int = 0
    with_target: bool = False
    other_macs: int = 0

    def __getitem__(self, name: str) -> LayerStats:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def input_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs as rows of the layer's weight matrix: ``[count, in]``, or a convolution's patches, in chunks."""
    x = x if x.dtype == torch.float64 else x.float()
    if not isinstance(module, nn.Conv2d):
        yield x.reshape(-1, x.shape[-1])
        return
    x = pad_input(module, x)
    area = x.shape[-1] * x.shape[-2] // (module.stride[0] * module.stride[1])
    step = max(1, _CHUNK // max(1, area * module.weight[0].numel()))
    for chunk in torch.split(x, step):
        patches = F.unfold(chunk, module.kernel_size, module.dilation, stride=module.stride)
        yield patches.mT.reshape(-1, patches.shape[1])


def pad_input(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What the convolution sees: its input padded by its own numbers and mode."""
    if isinstance(conv.padding, str):
        totals = [
            d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (*sides[1], *sides[0]), mode=mode)
