"""Running second moments of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .readable import Readable

_PART = 1024
"""Rows of a moment that are added at once."""


@dataclass
class Moments:
    """Running mean and second moment of rows, in fp64 unless they were made in another dtype.

    Args:
        mean: ``E[x]``, ``[n]`` or ``[groups, n]``.
        second: ``E[x x^T]``, ``[n, n]`` (``[groups, n, n]``); its diagonal ``[n]`` for one-hot rows (embeddings).
        rows: how many rows went in.
    """

    mean: Readable[Tensor] = Readable()
    second: Readable[Tensor] = Readable()
    rows: int = 0

    @classmethod
    def zeros(
        cls,
        n: int,
        device: torch.device,
        *,
        groups: int = 1,
        diagonal: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> Moments:
        """Returns the moments before any row was seen."""
        device = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        mean = torch.zeros((n,) if groups == 1 else (groups, n), dtype=dtype, device=device)
        return cls(mean, mean.clone() if diagonal else mean.new_zeros(*mean.shape, n))

    def before_any(self) -> Moments:
        """Returns moments of the same shapes before any row was seen."""
        shape = vars(self)["second"].shape  # which may be in a file
        mean = torch.zeros_like(self.mean)
        return Moments(mean, mean.new_zeros(shape))

    def update(self, rows: Tensor) -> None:
        """Adds rows ``[count, n]`` (``[groups, count, n]``), with products in fp32 at least."""
        if rows.shape[-2]:
            self.add(*sums(rows), rows.shape[-2])

    def update_counts(self, indices: Tensor) -> None:
        """Adds one-hot rows, given by their index."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.mean))
        self.add(counts, counts, indices.numel())

    def add(self, total: Tensor, products: Tensor, count: int) -> None:
        """Adds the sums of ``count`` rows and of their products."""
        if count == 0:
            return
        self.rows += count
        add_to_mean_(self.mean, total, count, self.rows)
        add_to_mean_(self.second, products, count, self.rows)

    def covariance(self) -> Tensor:
        """Returns ``E[x x^T] - E[x] E[x]^T``; a diagonal as it is, since one-hot rows are not centred."""
        mean, second = self.mean, self.second
        if second.ndim == 1:
            return second
        return torch.addcmul(second, mean[..., :, None], mean[..., None, :], value=-1)

    def group(self, index: int) -> Moments:
        """Returns the moments of one group."""
        return self if self.mean.ndim == 1 else Moments(self.mean[index], self.second[index], self.rows)


def add_to_mean_(mean: Tensor, total: Tensor, count: int, rows: int) -> None:
    """Adds the sum of ``count`` items to a running mean, in place, after which it is that of ``rows`` items."""
    mean.mul_(1 - count / rows)
    for own, new in zip(mean.split(_PART), total.to(mean.device).split(_PART), strict=True):
        own.add_(new, alpha=1 / rows)  # in parts, since torch copies what has another dtype


def sums(rows: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the sum of ``others [count, n]``, by default the rows themselves, and ``others^T rows``.

    Products are formed in fp32 at least, whatever autocast says, of rows scaled towards one: squares of 1e25 do not
    overflow, those of 1e-25 do not vanish: where they were scaled, products are returned in fp64. Sums always are.
    """
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    with torch.autocast(rows.device.type, enabled=False):
        unit, size = to_unit_scale(rows)
        other, other_size = (unit, size) if others is None else to_unit_scale(others)
        total, products = other.sum(-2).to(wide), other.mT @ unit
        for power in (other_size, size):
            products = products if power is None else products.to(wide).mul_(power.to(wide))
        return total if other_size is None else total * other_size.to(wide), products


def to_unit_scale(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns rows in fp32 at least, over a power of two near their largest entry, and that power; ``None`` for one."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = torch.maximum(*(end.abs() for end in rows.aminmax()))
    if rows.device.type == "cpu" and 1e-9 < float(largest) < 1e9:  # elsewhere asking would wait for the device
        return rows, None
    power = torch.frexp(largest).exponent.clamp(-120, 120)
    return torch.ldexp(rows, -power), torch.ldexp(torch.ones_like(largest), power)
