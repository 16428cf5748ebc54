"""Adapters of grouped convolutions as PEFT trains them: ``A`` reads the channels of all groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LowRankError
from ..layers.patches import pad_input
from .adapter import Adapter, Bank
from .weight_layout import Kernel, WeightLayout, parameter_of


class MixedGroups(Adapter):
    """``A`` is ``[r, in, *k]``, ``B`` ``[out, r / groups, 1, ...]``; their product fits no weight with groups."""

    def delta(self, layout: WeightLayout, dtype: torch.dtype | None = None) -> Tensor:
        """Raises: no weight of a grouped convolution can hold the product.

        Raises:
            LowRankError: always.
        """
        raise LowRankError(
            "this adapter of PEFT's lets each group of a convolution read the channels of all groups, which the weight"
            " cannot hold: it can be used, trained and saved, but not merged, combined or read as a weight. Train one"
            " with add_lora_, which stays inside the groups."
        )


def mixes_groups(bank: Bank) -> bool:
    """Whether one of the adapters mixes the groups of a convolution."""
    return any(isinstance(adapter, MixedGroups) for adapter in bank)


def mixed_forward(self: Any, bank: Bank, input: Tensor) -> Tensor:
    """The convolution with the adapters that its weight can hold, then the others beside it, then DoRA's lengths."""
    if bank.rows is not None:
        raise LowRankError("lora_rows: an adapter that mixes the groups of a convolution serves all rows alike.")
    layout = bank.layout
    assert isinstance(layout, Kernel)
    weight = parameter_of(self, "weight")
    assert weight is not None
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
    gated = list(zip(bank, bank.gates, strict=True))
    for adapter, gate in gated:
        if not isinstance(adapter, MixedGroups):
            weight = weight + (gate * adapter.delta(layout)).to(weight.dtype)
    out: Tensor = self._conv_forward(input, weight, self.bias)
    for adapter, gate in gated:
        if isinstance(adapter, MixedGroups):
            x = pad_input(self, F.dropout(input, adapter.dropout, self.training))
            inner = conv(x, adapter.A.to(x.dtype), None, self.stride, 0, self.dilation)
            inner = (inner * (gate * adapter.scaling).view(1)).to(inner.dtype)
            out = out + conv(inner, adapter.B.to(inner.dtype), groups=layout.groups)
    surplus = _surplus(weight, gated, layout)
    if surplus is None:
        return out
    channels = (-1, *[1] * len(self.kernel_size))
    linear = out if self.bias is None else out - self.bias.to(out.dtype).view(channels)
    return out + surplus.to(out.dtype).view(channels) * linear


def _surplus(weight: Tensor, gated: list[tuple[Adapter, Tensor]], layout: Kernel) -> Tensor | None:
    """What DoRA multiplies each output by, minus one; adapter by adapter, with the lengths as constants."""
    if all(adapter.magnitude is None for adapter, _ in gated):
        return None
    mixed = [(adapter, gate * adapter.scaling) for adapter, gate in gated if isinstance(adapter, MixedGroups)]
    with torch.no_grad():
        lengths = lengths_with(weight, [(a.A, a.B, strength) for a, strength in mixed], layout)
    factor = torch.ones_like(lengths)
    for adapter, gate in gated:
        if adapter.magnitude is not None:
            factor = factor * (1 + gate * (adapter.magnitude / (factor.detach().abs() * lengths) - 1))
    return factor - 1


def lengths_with(weight: Tensor, mixed: list[tuple[Tensor, Tensor, Tensor]], layout: Kernel) -> Tensor:
    """The norm of the entries of each output, of the weight plus ``strength B A`` over all channels.

    ``|W + D|^2 = |W|^2 + 2 <W, D> + |D|^2``, where only the output's own group of ``D = B A`` meets ``W``, and
    ``|D|^2 = B (A A^T) B^T``: the wide ``D`` is never formed.
    """
    groups, wide = layout.groups, torch.promote_types(weight.dtype, torch.float32)
    own = weight.to(wide).unflatten(0, (groups, -1))
    a = torch.cat([x.to(wide).unflatten(0, (groups, -1)) for x, _, _ in mixed], 1)
    b = torch.cat([(s * x).to(wide).unflatten(0, (groups, -1)) for _, x, s in mixed], 2).flatten(2)
    inside = torch.stack([a[k].unflatten(1, (groups, -1))[:, k] for k in range(groups)])
    cross = torch.einsum("go...,gr...->gor", own, inside)
    squares = own.flatten(2).square().sum(-1) + 2 * (b * cross).sum(-1)
    gram = torch.einsum("gri,gsi->grs", a.flatten(2), a.flatten(2))
    squares = squares + torch.einsum("gor,grs,gos->go", b, gram, b)
    lengths: Tensor = squares.clamp_min(0).sqrt().flatten()
    return lengths


def dora_ratio(weight: Tensor, a: Tensor, b: Tensor, scaling: float, groups: int) -> Tensor:
    """Ratio of our magnitude to PEFT's, whose lengths (0.21) are those of another delta where there are groups.

    It multiplies ``B`` as ``[out / groups, r]`` with ``A`` as ``[r, in * area]``. With the ratio the outputs are equal.

    Args:
        weight: weight of the convolution.
        a: ``A`` of the file, ``[r, in, *k]``.
        b: ``B`` of the file, ``[out, r / groups, 1, ...]``.
        scaling: what their product is multiplied by.
        groups: number of groups of the convolution.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, a, b = weight.to(wide), a.to(weight.device, wide), b.to(weight.device, wide)
    delta = (b.reshape(-1, len(a)) @ a.flatten(1)).reshape(weight.shape)
    theirs: Tensor = torch.linalg.vector_norm((weight + scaling * delta).flatten(1), dim=1)
    return lengths_with(weight, [(a, b, weight.new_tensor(scaling))], Kernel(groups)) / theirs
